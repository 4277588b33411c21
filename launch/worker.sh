#!/usr/bin/env bash
# What tpu_vm.sh has done on a worker; it copies this file to ~/pangu-tiny there.
#   worker.sh install | start BUCKET MOUNT GRACE | follow FIRST_LINE | state | stop
set -euo pipefail
cd "$(dirname "$0")"

case $1 in
  install)
    # The images have Python 3.10; uv gets a newer one.
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --clear --python 3.12 .venv
    mkdir -p code gin
    tar -xzf code.tar.gz -C code
    python3 -m uv pip install --quiet --python .venv/bin/python './code[tpu]'
    if ! command -v gcsfuse > /dev/null; then
      key=/usr/share/keyrings/cloud.google.asc
      curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" > /dev/null
      echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
      sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
      sudo apt-get -qq -o DPkg::Lock::Timeout=600 install gcsfuse
    fi
    ;;
  start)
    if systemctl is-active --quiet pangu-tiny; then exit; fi
    sudo mkdir -p "$3"
    sudo chown "$(id -u)" "$3"
    mountpoint -q "$3" || gcsfuse -o ro --implicit-dirs "$2" "$3"
    touch log # so that it is the user's, not root's
    # A unit outlives the connection, and gets SIGTERM when the machine is stopped; it is ordered
    # after the network, so that it is stopped before it.
    sudo systemctl reset-failed pangu-tiny 2> /dev/null || true
    sudo systemd-run --quiet --unit=pangu-tiny --uid="$(id -u)" --working-directory="$PWD/gin" \
      --property=RemainAfterExit=yes --property=TimeoutStopSec="$4" \
      --property=After=network-online.target --property=LimitMEMLOCK=infinity \
      --property=StandardOutput=append:"$PWD/log" --property=StandardError=append:"$PWD/log" \
      bash "$PWD/stage.sh"
    ;;
  follow) # each line with its number
    pid=$(systemctl show pangu-tiny --property=MainPID --value)
    options=()
    [ "$pid" -eq 0 ] || options=(--follow --pid="$pid")
    number=$2
    tail --lines=+"$2" "${options[@]}" log | while IFS= read -r line || [ "$line" ]; do
      printf '%s:%s\n' "$number" "$line"
      number=$((number + 1))
    done
    ;;
  state) # "running" or the like, or the exit code; 255 where the machine has forgotten it
    state=$(systemctl show pangu-tiny --property=SubState --value)
    case $state in
      exited | failed) systemctl show pangu-tiny --property=ExecMainStatus --value ;;
      dead) echo 255 ;;
      *) echo "$state" ;;
    esac
    ;;
  stop)
    sudo systemctl stop pangu-tiny 2> /dev/null || true
    ;;
esac

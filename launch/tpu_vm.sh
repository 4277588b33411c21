#!/usr/bin/env bash
# A stage on TPU VMs of a queued resource: on every worker of the slices that its hardware file
# names, or on the first alone where the stage needs no TPU. See README.md.
#   launch/tpu_vm.sh OPTIONS start NAME STAGE --gin_file=F … [--gin.NAME=VALUE …]
#   launch/tpu_vm.sh OPTIONS follow NAME
#   launch/tpu_vm.sh OPTIONS delete NAME
# `start` watches over the job: it starts the stage again, on new slices where Google took the old
# ones, and deletes the slices in the end. Options: --project= --zone=, and for start --bucket= and
# those below.
zone=''
mount=/data            # where the bucket is mounted, to be read
service_account=''
source=''              # a clone or its URL; by default the one of this script
attempts=10            # how often the stage is started, at most
grace=300              # seconds to save a checkpoint when it is stopped
valid_until_duration='' # how long to wait for slices, such as 6h
spot='' reserved=''
settings="project zone bucket mount service-account source attempts grace valid-until-duration"
switches="dry-run spot reserved"
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
tries=3 # to reach a worker
lines=0 # of the log that were shown
first=(--node=0 --worker=0)
everyone=(--node=all --worker=all) # whom the stage runs on

queued() { # VERB ARGUMENTS…
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$@" --zone="$zone" --project="$project"
}

described() { # FORMAT ANSWER
  ask "$2" gcloud compute tpus queued-resources describe "$name" --format="value($1)" \
    --zone="$zone" --project="$project"
}

delete() { queued delete "$name" --force --quiet; }

worker() { # WHAT WORKERS…: worker.sh there
  queued ssh "$name" "${@:2}" --command="bash pangu-tiny/worker.sh $1" \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4
}

patiently() { # COMMAND…: tried again where workers do not answer
  local i
  for ((i = 1; i <= tries; i++)); do
    if "$@"; then return; fi
    [ "$i" -eq "$tries" ] || pause 30
  done
  return 1
}

# Says what failed, and which workers do not answer at all.
blame() { # WHAT
  local node host silent=''
  for ((node = 0; node < slice[slices]; node++)); do
    for ((host = 0; host < slice[hosts]; host++)); do
      queued ssh "$name" --node="$node" --worker="$host" --command=true > /dev/null 2>&1 ||
        silent+=" $node/$host"
    done
  done
  say "$1 failed after $tries tries; slice/worker without an answer:${silent:- none}"
}

# Asks for the slices and waits; fails where Google takes them away again.
get_slices() {
  local options=() state last='' silent=0
  [ -z "$spot" ] || options+=(--spot)
  [ -z "$reserved" ] || options+=(--reserved)
  [ -z "$service_account" ] || options+=(--service-account="$service_account")
  [ -z "$valid_until_duration" ] || options+=(--valid-until-duration="$valid_until_duration")
  if [ "${slice[slices]}" -eq 1 ]; then
    options+=(--node-id="$name")
  else
    options+=(--node-count="${slice[slices]}" --node-prefix="$name")
  fi
  undo=(delete)
  queued create "$name" --accelerator-type="${slice[accelerator]}" \
    --runtime-version="${slice[runtime]}" "${options[@]}" --async || {
    # An answer that was lost on its way may have been another one.
    if [ "$(described state.state '' 2> /dev/null)" = '' ]; then undo=(); fi
    fail "${slice[slices]} × ${slice[accelerator]} was refused" 1
  }
  while true; do
    if state=$(described state.state ACTIVE); then
      silent=0
    else
      silent=$((silent + 1)) state=$last
      [ $silent -lt 5 ] || fail "Google Cloud does not answer (5 tries)" 1
    fi
    [ "$state" = "$last" ] || say "$state"
    last=$state
    case $state in
      ACTIVE) return ;;
      FAILED) fail "no slices: $(described state.failedData.error.message '')" 1 ;;
      SUSPENDING | SUSPENDED) return 1 ;;
    esac
    pause 30
  done
}

install() {
  patiently queued scp --recurse "$scratch/pangu-tiny" "$name:" "${everyone[@]}" ||
    { blame "copying" && return 1; }
  patiently worker install "${everyone[@]}" || { blame "installing" && return 1; }
  lines=0
}

# The log of the first worker until the stage has ended; `outcome` is then its exit code, or what
# happened to the slices.
watch() {
  local line number state silent=0 offline=''
  while true; do
    while IFS= read -r line || [ "$line" ]; do
      number=${line%%:*} # what gcloud asks for again after a broken connection was shown already
      [[ $number =~ ^[0-9]+$ ]] && [ "$number" -gt "$lines" ] || continue
      printf '%s\n' "${line#*:}"
      lines=$number
    done < <(worker "follow $((lines + 1))" "${first[@]}")
    if state=$(worker state "${first[@]}"); then
      silent=0 offline=''
      [ -z "$dry_run" ] || state=0
      if [[ $state =~ ^[0-9]+$ ]]; then
        outcome=$state
        return
      fi
      pause 5
      continue
    fi
    if ! state=$(described state.state ACTIVE); then
      if [[ $(described state.state '' 2>&1) == *NOT_FOUND* ]]; then
        outcome=deleted
        return
      fi
      # This machine is offline, not the worker.
      [ "$offline" ] || say "Google Cloud does not answer; waiting for it, $name goes on"
      offline=yes
      pause 30
      continue
    fi
    if [ "$state" != ACTIVE ]; then
      outcome=$state
      return
    fi
    silent=$((silent + 1)) offline=''
    if [ $silent -eq $tries ]; then
      say "worker 0/0 does not answer ($tries tries)"
      outcome=silent
      return
    fi
    pause 30
  done
}

# The bundle that every worker gets: code, worker.sh, the command, and the user's own gin files.
bundle() {
  local file
  clone "${source:-$here/..}"
  mkdir -p "$scratch/pangu-tiny/gin"
  run git -C "$scratch/clone" archive --format=tar.gz --output="$scratch/pangu-tiny/code.tar.gz" HEAD
  cp "$here/worker.sh" "$scratch/pangu-tiny/"
  printf 'exec ~/pangu-tiny/.venv/bin/%s\n' "${slice[command]}" > "$scratch/pangu-tiny/stage.sh"
  for file in "${files[@]}"; do
    mkdir -p "$scratch/pangu-tiny/gin/$(dirname "$file")"
    cp "$file" "$scratch/pangu-tiny/gin/$file"
  done
  if [ "$dry_run" ]; then
    show cat pangu-tiny/stage.sh
    cat "$scratch/pangu-tiny/stage.sh"
  fi
}

start() {
  local attempt have=''
  need project zone bucket
  need_bucket
  need_number attempts grace
  need_tools gcloud git
  need_name
  read_stage "$@"
  [ "${slice[topology]:-}" ] || fail "no Hardware.topology: add a hardware file, also where the stage needs no TPU"
  [ "${slice[workers]}" = all ] || everyone=("${first[@]}")
  again="--project=$project --zone=$zone"
  if ! [ "$dry_run" ] && described state.state '' > /dev/null 2>&1; then
    fail "there is a queued resource $name already; follow or delete it, or take another name"
  fi
  bundle
  write_bucket
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    [ $attempt -eq 1 ] || say "attempt $attempt of $attempts"
    if [ -z "$have" ]; then
      if get_slices && install; then
        have=yes
      else
        delete
        undo=()
        continue
      fi
    fi
    if patiently worker "start $bucket $mount $grace" "${everyone[@]}"; then
      undo=() following=yes
      watch
      undo=(delete) following=''
    else
      blame "starting"
      outcome=silent
    fi
    case $outcome in
      0)
        say "done"
        exit
        ;;
      deleted)
        undo=()
        fail "$name was deleted by somebody else" 1
        ;;
      2) fail "$name: the stage ended with a mistake to mend (exit code 2, see its last line)" ;;
      [0-9]*)
        say "the stage ended with exit code $outcome"
        patiently worker stop "${everyone[@]}" || outcome=silent
        ;;
      *) say "the slices are lost: $outcome" ;;
    esac
    if ! [[ $outcome =~ ^[0-9]+$ ]]; then
      delete
      undo=() have=''
    fi
  done
  fail "$name did not come to its end in $attempts attempts" 1
}

read_options "$@"
command=${words[0]:-} name=${words[1]:-}
case $command in
  start) start "${words[@]:2}" ;;
  follow | delete)
    need project zone
    need_tools gcloud
    need_name
    again="--project=$project --zone=$zone"
    if [ "$command" = delete ]; then
      delete
    else
      following=yes
      watch
      say "ended: $outcome (an exit code, or the state of its slices); $0 $again delete $name frees them"
    fi
    ;;
  *) fail "unknown command '$command', expected start NAME STAGE FLAGS…, follow NAME or delete NAME" ;;
esac

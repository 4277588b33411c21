# shellcheck shell=bash
# Sourced by gke.sh and tpu_vm.sh, which set `settings` and `switches`, the names of their options.
# What reaches beyond this machine goes through `run` or `ask`, so that --dry-run does none of it.
set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "${0##*/}: bash 4.4 or later is needed, this is $BASH_VERSION" >&2
  exit 2
fi
: "${settings:?}" "${switches:?}"
exec 3>&1 # where --dry-run prints, also from within $(…)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dry_run=
name=
project=
bucket=
again=     # the options that name the job
following= # whether the job goes on without this script
undo=()    # what takes back what was begun, while that is not to stay

fail() { # MESSAGE [EXIT CODE]: 2 is the user's mistake
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit "${2:-2}"
}

say() { printf '%s: %s\n' "${name:-${0##*/}}" "$1" >&2; }

show() {
  printf '%q ' "$@" >&3
  printf '\n' >&3
}

run() {
  if [ "$dry_run" ]; then show "$@"; else "$@"; fi
}

ask() { # ANSWER COMMAND…: what the command prints; under --dry-run the answer
  local answer=$1
  shift
  if [ "$dry_run" ]; then
    show "$@"
    printf '%s\n' "$answer"
  else
    "$@"
  fi
}

pause() { run sleep "$1"; }

# Reads options up to the first other word, and leaves the rest in `words`.
read_options() {
  local option
  while [[ ${1:-} == --* ]]; do
    option=${1%%=*}
    option=${option#--}
    if [[ $1 == *=* && " $settings " == *" $option "* ]]; then
      [[ $option == source || ${1#*=} =~ ^[A-Za-z0-9._:/@-]+$ ]] ||
        fail "$1: expected letters, digits and . _ : / @ -"
      printf -v "${option//-/_}" %s "${1#*=}"
    elif [[ $1 != *=* && " $switches " == *" $option "* ]]; then
      printf -v "${option//-/_}" yes
    else
      fail "unknown option $1, expected --${settings// /=… --}=… or --${switches// / or --}, before the command"
    fi
    shift
  done
  # shellcheck disable=SC2034
  words=("$@")
}

need() { # OPTION…: which have to be given
  local option
  for option in "$@"; do
    option=${option//-/_}
    [ "${!option}" ] || fail "no ${option//_/ }: expected --${option//_/-}=… before the command"
  done
}

need_number() {
  local option
  for option in "$@"; do
    [[ ${!option} =~ ^[0-9]+$ ]] || fail "--$option=${!option}: expected a whole number"
  done
}

need_tools() {
  local tool
  for tool in "$@"; do
    [ "$dry_run" ] || command -v "$tool" > /dev/null || fail "$tool is not installed"
  done
}

need_name() {
  [[ $name =~ ^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$ ]] ||
    fail "name '$name': expected up to 30 small letters, digits and -, a letter first"
}

need_bucket() {
  [[ $bucket =~ ^[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$ ]] ||
    fail "--bucket=$bucket: expected the name of a bucket, without gs://"
}

# Asks slice.py what a stage needs: `slice`, the words of the command, and the user's own gin files.
declare -A slice=()
stage_words=() files=() texts=()
read_stage() {
  local answer line
  [ $# -gt 0 ] || fail "no stage: expected start NAME STAGE FLAGS…"
  answer=$("${PYTHON:-python3}" "$here/slice.py" "$@") || exit
  while IFS= read -r line; do
    case $line in
      word=*) stage_words+=("${line#*=}") ;;
      file=*) files+=("${line#*=}") ;;
      text=*) texts+=("${line#*=}") ;;
      *=*) slice[${line%%=*}]=${line#*=} ;;
    esac
  done <<< "$answer"
  if [ -z "${slice[workers]:-}" ]; then # --help
    printf '%s\n' "$answer"
    exit
  fi
}

write_bucket() { # and take it back, to see whether it can be written
  local probe=gs://$bucket/$name.probe
  undo=(run gcloud storage rm "$probe" --project="$project")
  run gcloud storage cp - "$probe" --project="$project" <<< "written by ${0##*/}, to be removed" || {
    undo=()
    fail "gs://$bucket cannot be written"
  }
  undo=()
  run gcloud storage rm "$probe" --project="$project"
}

scratch=
leave() { # on every exit
  local code=$?
  trap '' INT TERM
  if [ ${#undo[@]} -gt 0 ]; then
    say "cleaning up"
    "${undo[@]}" || {
      say "that failed; what is left costs money until it is deleted"
      [ "$code" -ne 0 ] || code=1
    }
  fi
  [ -z "$scratch" ] || rm -rf "$scratch"
  exit "$code"
}

interrupted() {
  trap '' INT TERM
  if [ "$following" ]; then
    say "goes on; $0 $again follow $name shows it, $0 $again delete $name ends it"
  fi
  exit 130
}
trap leave EXIT
trap interrupted INT TERM

clone() { # SOURCE: what is committed there, in $scratch/clone
  scratch=$(mktemp -d)
  run git clone --quiet -- "$1" "$scratch/clone" || fail "$1 cannot be cloned"
}

#!/usr/bin/env bash
# From a clone to a trained model and its report, on a machine with nothing but Python 3.11:
#   ./launch/quickstart.sh [WORKDIR] [--gin.NAME=VALUE …]
# Run again, it does only what is not done yet.
set -euo pipefail
cd "$(dirname "$0")/.."
workdir=runs/quickstart
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  workdir=$1
  shift
fi
source launch/environment.sh ""
exec pangu-tiny reproduce --gin_file=recipes/quickstart.gin --gin.reproduce.workdir="$workdir" "$@"

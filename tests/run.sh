#!/usr/bin/env bash
# Makes a virtual environment (once) and runs the tests:
#   ./tests/run.sh [--parity | --lowest] [PYTEST ARGUMENTS]
# Those of several or killed processes, of gs://, and what else takes long run on their own: -m pods.
# --parity also compares against PyTorch and transformers themselves, which are large.
# --lowest takes the oldest versions that setup.cfg allows, in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=test,hf,plan,beam,gcs
case "${1:-}" in
  --parity)
    shift
    extras=$extras,parity
    set -- tests -m "not pods" "$@"
    ;;
  --lowest)
    shift
    extras=test,hf
    PANGU_TINY_VENV=.venv-lowest
    constraints=$(mktemp)
    sed -nE 's/^ +([A-Za-z_-]+)(\[.*\])?>=([0-9.]+)$/\1==\3/p' setup.cfg | grep -v beam > "$constraints"
    ;;
esac
source launch/environment.sh "$extras" ${constraints:+--constraint "$constraints"}
export JAX_PLATFORMS=cpu
exec python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "$@"

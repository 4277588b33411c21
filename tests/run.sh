#!/usr/bin/env bash
# Makes a virtual environment (once) and runs the tests: ./tests/run.sh [--parity] [PYTEST ARGUMENTS]
# --parity also compares against PyTorch and transformers themselves, which are large.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=test,hf,plan,beam
if [ "${1:-}" = --parity ]; then
  shift
  extras=$extras,parity
  set -- tests -m "parity or not parity" "$@"
fi
source launch/environment.sh "$extras"
export JAX_PLATFORMS=cpu
exec python -m pytest "$@"

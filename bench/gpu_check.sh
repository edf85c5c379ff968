#!/usr/bin/env bash
# What this machine's GPU makes of the kernels: builds everything, runs the tests marked gpu on every backend, times every
# op beside its peers, and writes one report under bench/results/. Ends within 8 minutes, what building took among them,
# where that took less than 6; what is not done by then is told. (Not tried on a GPU so far.)
# Exits non-zero where there is no GPU, where no test ran, and where anything failed.
#   PYTHON=python3   use this interpreter, which must have this package installed (pip install -e '.[test]') and torch with
#                    CUDA; else .venv is made
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  make --no-print-directory .venv/.uvg-dev >&2
  PYTHON=.venv/bin/python
fi
exec "$PYTHON" -m bench.gpu_check --spent "$SECONDS" "$@"

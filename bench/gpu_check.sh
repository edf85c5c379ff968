#!/usr/bin/env bash
# What this machine's GPU makes of the kernels: builds everything, runs the tests marked gpu on every backend, times every
# op beside its peers, and writes one report under bench/results/. Ends within 8 minutes, what building took among them,
# where that took less than 6; what is not done by then is told. (Not tried on a GPU so far.)
# Exits non-zero where there is no GPU, where no test ran, and where anything failed.
#   PYTHON=python3   use this interpreter, which must have torch with CUDA, pytest, pytest-timeout and hypothesis, and
#                    where this package is not installed also setuptools, pybind11, cmake and ninja: it is then installed
#                    in place, for this GPU alone where nvcc knows it, without fetching anything. Unset: python3, where
#                    it has these and sees a GPU and no .venv was made; else .venv is made
set -euo pipefail
cd "$(dirname "$0")/.."
needs="import torch, pytest, pytest_timeout, hypothesis; assert torch.cuda.is_available()"
if [ -z "${PYTHON:-}" ] && [ ! -e .venv/.uvg-dev ] && python3 -c "$needs" 2>/dev/null; then
  PYTHON=python3
fi
if [ -z "${PYTHON:-}" ]; then
  make --no-print-directory .venv/.uvg-dev >&2
  PYTHON=.venv/bin/python
elif ! "$PYTHON" -c "import uvg_engine.kernels" 2>/dev/null; then
  if [ -z "${UVG_CUDA_ARCHS:-}" ]; then
    arch=$("$PYTHON" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
    if "$PYTHON" -c "import setup, sys; sys.exit('$arch' not in setup.known_archs(setup.find_nvcc() or 'nvcc'))"; then
      export UVG_CUDA_ARCHS=$arch
    fi
  fi
  UVG_BUILD_DIR=build/native "$PYTHON" -m pip install -q --no-index --no-deps --no-build-isolation -e . >&2
fi
exec "$PYTHON" -m bench.gpu_check --spent "$SECONDS" "$@"

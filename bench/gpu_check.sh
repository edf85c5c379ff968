#!/usr/bin/env bash
# What this machine's GPU makes of the kernels: builds everything, runs the tests marked gpu on every backend, times every
# op beside its peers, and writes one report under bench/results/. (Not tried on a GPU so far.)
# Ends within 8 minutes whatever hangs: building is ended after 350 s, tests and timings by 468 s and all of it by 480 s.
# What is not done by then is told in the report, which is written in any case but where there is no GPU or it is
# interrupted.
# Exits non-zero where there is no GPU, where no test ran, and where anything failed.
#   PYTHON=python3   use this interpreter, which must have torch with CUDA, pytest, pytest-timeout and hypothesis, and
#                    where this package is not installed also setuptools, pybind11, cmake and ninja: it is then installed
#                    in place, for this GPU alone where nvcc knows it, without fetching anything. Unset: python3, where
#                    it has these and sees a GPU and no .venv was made; else .venv is made
#   UVG_BUILD_ENDS, UVG_CHECK_ENDS   other seconds than 345 and 475, at which building and all of it are asked to end
set -euo pipefail
cd "$(dirname "$0")/.."
build_ends=${UVG_BUILD_ENDS:-345} ends=${UVG_CHECK_ENDS:-475}  # seconds; what hangs is killed 5 later
needs="import torch, pytest, pytest_timeout, hypothesis; assert torch.cuda.is_available()"

by() {  # by SECOND COMMAND...: ended at this second of the script. Waited for, so that the shell heeds an interrupt
  timeout -k 5 "$(($1 > SECONDS ? $1 - SECONDS : 1))" "${@:2}" &
  wait $!
}
trap 'kill -TERM $! 2>/dev/null; wait $! || true; exit 130' INT TERM

lost() {  # lost WHAT: a report of what is not one of the check's own
  mkdir -p bench/results
  printf '# The kernels on a GPU\n\nAll well: no.\n\n%s\n' "$1" > bench/results/gpu_check_ended.md
  echo '{"ok": false, "report": "bench/results/gpu_check_ended.md"}'
  exit 1
}

rm -f bench/results/gpu_check_ended.md  # of a run before
if [ -z "${PYTHON:-}" ] && [ ! -e .venv/.uvg-dev ] && by 60 python3 -c "$needs" 2>/dev/null; then
  PYTHON=python3
fi
code=0
if [ -z "${PYTHON:-}" ]; then
  by "$build_ends" make --no-print-directory .venv/.uvg-dev >&2 || code=$?
  PYTHON=.venv/bin/python
elif ! by "$build_ends" "$PYTHON" -c "import uvg_engine.kernels" 2>/dev/null; then
  if [ -z "${UVG_CUDA_ARCHS:-}" ]; then
    arch=$(by "$build_ends" "$PYTHON" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())") || code=$?
    known="import setup, sys; sys.exit('$arch' not in setup.known_archs(setup.find_nvcc() or 'nvcc'))"
    if [ "$code" = 0 ] && by "$build_ends" "$PYTHON" -c "$known"; then
      export UVG_CUDA_ARCHS=$arch
    fi
  fi
  install=("$PYTHON" -m pip install -q --no-index --no-deps --no-build-isolation -e .)
  [ "$code" != 0 ] || UVG_BUILD_DIR=build/native by "$build_ends" "${install[@]}" >&2 || code=$?
fi
[ "$code" = 0 ] || lost "Building ended with exit $code after $SECONDS s (124, 137: it took too long). No test ran, nothing was timed."
answer=$(mktemp)
by "$ends" "$PYTHON" -m bench.gpu_check --spent "$SECONDS" --asked "$EPOCHSECONDS" "$@" > "$answer" || code=$?
told=$(cat "$answer")
rm -f "$answer"
if [ "$code" != 0 ] && [[ $told != *'"ok"'* ]]; then
  lost "bench.gpu_check ended with exit $code after $SECONDS s (124, 137: it took too long). All tests and timings are lost."
fi
[ -z "$told" ] || printf '%s\n' "$told"
exit "$code"

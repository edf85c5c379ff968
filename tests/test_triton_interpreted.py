"""The triton backend on the CPU: the tests of tests/ops that concern it, in a process whose kernels are interpreted.

It needs half of the time that all tests take, on one core. So it is begun before the first test of all, and the test
waits for its end. By hand, and narrowed:
`TRITON_INTERPRET=1 python -m pytest tests/ops/test_gated_residual.py -k triton`.
"""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from uvg_engine.backends import triton as backend

ROOT = Path(__file__).resolve().parents[1]
# What the shared suite asks of every backend, but no kernel has a part in: errors of arguments, threads, autograd.
WHICH = (
    "triton and not mistake and not threads and not second_derivative and not default_dtype and not inference_mode "
    "and not may_ask"
)

_begun: list[tuple[subprocess.Popen[bytes], Path]] = []


def before_all_tests() -> None:
    """Begins the tests under the interpreter, in a process of one thread (conftest.py)."""
    if _begun or backend.interpreting() or find_spec("triton") is None:
        return
    handle, name = tempfile.mkstemp(suffix=".log")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-k", WHICH, "tests/ops"]
    with open(handle, "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    _begun.append((process, Path(name)))


def after_all_tests() -> None:
    """Leaves nothing behind, also where the test was not reached."""
    while _begun:
        process, log = _begun.pop()
        process.kill()
        process.wait()
        log.unlink()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(backend.interpreting(), reason="this is the process with the interpreter")
def test_interpreted_kernels():
    pytest.importorskip("triton")
    process, log = _begun[0]
    code = process.wait()
    told = log.read_text(errors="replace")
    assert code == 0, told[-8000:]
    last = told.strip().splitlines()[-1]
    assert " passed" in last, last

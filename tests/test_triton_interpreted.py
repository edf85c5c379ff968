"""The triton backend on the CPU: the tests of tests/ops that concern it, in a process whose kernels are interpreted.

By hand, and narrowed: `TRITON_INTERPRET=1 python -m pytest tests/ops/test_gated_residual.py -k triton`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from uvg_engine.backends import triton as backend

ROOT = Path(__file__).resolve().parents[1]
# What the shared suite asks of every backend, but no kernel has a part in: errors of arguments, threads, autograd.
WHICH = (
    "triton and not mistake and not threads and not second_derivative and not default_dtype and not inference_mode "
    "and not may_ask"
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(backend.interpreting(), reason="this is the process with the interpreter")
def test_interpreted_kernels():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-k", WHICH, "tests/ops"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert " passed" in last, last

"""torch and the native core share one pool of threads: none is started beside torch's, so they cannot be in each
other's way. What that costs in time stands in AGENTS.md."""

import subprocess
import sys

import pytest

from uvg_engine.backends import native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=str(native.why_not()))
MIXED = """
import os, torch
from uvg_engine import backends, ops

torch.set_num_threads(3)
a, q = torch.randn(512, 512), torch.randn(512, 8, 64, requires_grad=True)
spans = torch.tensor([[[0, 512]]], dtype=torch.int32)
counts = []
for _ in range(3):
    (a @ a).relu_()
    counts.append(len(os.listdir("/proc/self/task")))
    with backends.force("cpu"):
        out = ops.flash_attention(q, q, q, spans, spans)[0]
    counts.append(len(os.listdir("/proc/self/task")))
print(len(set(counts)), counts)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the threads in /proc")
def test_a_mixed_loop_starts_no_second_pool():
    done = subprocess.run([sys.executable, "-c", MIXED], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 "), done.stdout

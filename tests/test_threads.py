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


SIZES = """
import os, torch
from uvg_engine import backends, ops

torch.set_num_threads(5)
weight, bias = torch.randn(96, 64, requires_grad=True), torch.randn(96, requires_grad=True)
seen = []
for rows in (1, 7, 40, 200, 800, 3, 400):
    x = torch.randn(rows, 64, requires_grad=True)
    q, span = x.view(rows, 2, 32), torch.tensor([[[0, rows]]], dtype=torch.int32)
    names = torch.arange(rows)
    with backends.force("cpu"):
        out = ops.linear(ops.modulated_layer_norm(x), weight, bias, activation="gelu_tanh")
        losses = ops.linear_cross_entropy(x, weight, bias, names % 96)
        (out.sum() + losses.sum() + ops.flash_attention(q, q, q, span, span)[0].sum()).backward()
        ops.linear_sample(x.detach(), weight.detach(), bias.detach(), names, names, names)
    seen.append(frozenset(os.listdir("/proc/self/task")))
print(len(set(seen[4:])), seen)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the threads in /proc")
def test_no_call_ends_threads_of_the_pool():
    """A region of fewer threads would: the next one of all had to make them anew (csrc/common/threads.h)."""
    done = subprocess.run([sys.executable, "-c", SIZES], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 "), done.stdout

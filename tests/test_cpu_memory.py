"""The kernels of the cpu backend where memory ends: an error that Python sees, not the end of the process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from uvg_engine.backends import native

CSRC = Path(__file__).parents[1] / "csrc/cpu"
SCARCE = """
import resource, torch
from uvg_engine import backends, ops

torch.set_num_threads(2)
count = 60_000  # keys, ten seen by both samples: each thread sums up 2 * 60,000 * 256 floats
q, k = torch.zeros(4, 2, 256, requires_grad=True), torch.zeros(count, 2, 256)
spans = torch.tensor([[[0, 2]], [[2, 2]]]).int(), torch.tensor([[[0, count]], [[0, 10]]]).int()
with backends.force("cpu"):
    out = ops.flash_attention(q, k, k, *spans)[0]
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 270 * 2**20,) * 2)
    try:
        torch.autograd.grad(out.sum(), q)
    except MemoryError:
        print("told")
"""


@pytest.mark.skipif(native.cpu() is None, reason=str(native.why_not()))
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_a_kernel_without_memory_raises():
    done = subprocess.run([sys.executable, "-c", SCARCE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr


def regions(text):
    """What stands in the braces after each `#pragma omp parallel`."""
    for found in re.finditer(r"#pragma omp parallel(?! for).*\n\s*\{", text):
        end, depth = found.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield text[found.end() : end]


def test_no_region_allocates():
    """What throws inside an OpenMP region ends the process: memory is taken before (csrc/cpu/per_thread.h)."""
    found = [(path.name, region) for path in CSRC.iterdir() for region in regions(path.read_text())]
    assert len(found) >= 7
    assert [name for name, region in found if re.search(r"\b(Scratch|PartialSums|new|std::\w+) ", region)] == []

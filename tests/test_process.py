"""What the programs ask of their process: a test each in a process of its own, since there is no way back."""

import json
import os
import subprocess
import sys

LARGE = """
import json, resource, sys
from uvg_engine.process import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
import torch
from uvg_engine import ops
torch.manual_seed(0)
x, w = torch.randn(4096, 64), torch.randn(4096, 64)  # results of 64 MiB
bits = [ops.linear(x, w).double().sum().item() for _ in range(2)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bits.append(ops.linear(x, w).sum().item())
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, bits]))
"""
SPIN = """
import os
from uvg_engine.cli import main
main(["--version"])
print(os.environ.get("GOMP_SPINCOUNT"))
"""


def ran(code, *arguments, **environment):
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "UVG_KEEP_MEMORY")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=env | environment, capture_output=True, text=True, check=True).stdout


def test_kept_memory_needs_no_new_pages_and_changes_no_bit():
    kept, faults, bits = json.loads(ran(LARGE, "keep"))
    plain, more, same_bits = json.loads(ran(LARGE, "leave"))
    assert kept and not plain and bits == same_bits
    assert faults < 1000 and more > 4 * 10_000  # 64 MiB are 16,384 pages


def test_the_environment_may_say_no():
    kept, faults, _ = json.loads(ran(LARGE, "keep", UVG_KEEP_MEMORY="0"))
    assert not kept and faults > 4 * 10_000


def test_threads_of_the_command_line_wait_briefly_unless_told():
    assert ran(SPIN).split()[-1] == "10000"
    assert ran(SPIN, GOMP_SPINCOUNT="7").split()[-1] == "7"
    assert ran(SPIN, OMP_WAIT_POLICY="active").split()[-1] == "None"
    assert ran("import torch\n" + SPIN).split()[-1] == "None"

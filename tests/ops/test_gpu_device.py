"""gpu_device.py without a GPU: what is moved stays what it was, and what the tests on a device are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_device
import pytest
import test_gated_residual
import torch
from harness import FP32, spans

from uvg_engine import backends, ops

ROOT = Path(__file__).resolve().parents[2]


def test_memory_is_moved_as_it_is(monkeypatch):
    """Gaps and their poison, an offset, an expanded row, one matrix named twice, two views of one memory."""
    monkeypatch.setattr(gpu_device, "DEVICE", "cpu")
    buffer = torch.full((6, 8), torch.nan)
    gaps, offset = buffer[1:, ::2].t(), buffer.flatten()[3:]
    gaps.copy_(torch.arange(20.0).view(4, 5))
    row = torch.arange(3.0).expand(4, 3)
    given = (gaps, offset, 2.5, gaps, row, None, torch.empty(0, 3, dtype=torch.int32), torch.tensor(7))
    there = gpu_device.moved(given)
    for a, b in zip(there, given, strict=True):
        if torch.is_tensor(b):
            assert a.stride() == b.stride() and a.storage_offset() == b.storage_offset()
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            assert a.data_ptr() != b.data_ptr() or not b.numel()
    assert there[0] is there[3] and there[2] == 2.5 and there[5] is None
    assert there[0].untyped_storage().data_ptr() == there[1].untyped_storage().data_ptr()
    assert bool(there[1][0].isnan()), "the gaps are poison there too"


def test_calls_reach_the_device_and_come_back(monkeypatch):
    """Forward, backward and refusal get tensors of the device alone; afterwards the table is as before."""
    monkeypatch.setattr(gpu_device, "DEVICE", "meta")
    seen = []

    def noted(*places):
        def call(*args):
            seen.append({x.device.type for x in args if torch.is_tensor(x)})
            made = tuple(torch.empty_like(args[place]) for place in places)
            return made if len(made) > 1 else made[0] if made else None

        return call

    kernel = backends.Kernel(noted(0), noted(2, 3), noted())
    monkeypatch.setitem(backends.table("triton"), "gated_residual", kernel)
    monkeypatch.setattr(gpu_device, "_back", lambda x: torch.zeros(x.shape, dtype=x.dtype) if torch.is_tensor(x) else x)
    h, y, gate = (torch.ones(*shape, requires_grad=True) for shape in ((4, 8), (4, 8), (2, 8)))
    with gpu_device.forced("triton@gpu") as name:
        out = ops.gated_residual(h, y, gate, spans((0, 3), (3, 1)))
        grads = torch.autograd.grad(out.sum(), (h, y, gate))
    assert name == "triton" and len(seen) >= 3 and all(devices == {"meta"} for devices in seen)
    assert [x.device.type for x in (out, *grads)] == ["cpu"] * 4
    assert backends.table("triton")["gated_residual"] is kernel


def test_what_a_kernel_gets_wrong_there_is_seen(monkeypatch):
    """The shared suite fails on a device whose kernel errs in one number, and passes on one whose does not."""
    monkeypatch.setattr(gpu_device, "DEVICE", "cpu")
    honest = backends.table("reference")["gated_residual"]

    def forward(*args):
        out = honest.forward(*args)
        out[-1, -1] += error
        return out

    kernel = backends.Kernel(forward, honest.backward)
    monkeypatch.setitem(backends.table("triton"), "gated_residual", kernel)
    suite = test_gated_residual.TestGatedResidual()
    case = suite.cases[0]
    for error in (0.0, 0.1):
        with gpu_device.forced("triton@gpu") as name:
            if not error:
                suite.assert_right(case, case.inputs(FP32), FP32, name)
            else:
                with pytest.raises(AssertionError, match="output 0: error"):
                    suite.assert_right(case, case.inputs(FP32), FP32, name)


def test_names_and_marks(monkeypatch):
    monkeypatch.setattr(gpu_device, "DEVICE", None)
    assert gpu_device.names("moe_mlp") == []
    monkeypatch.setattr(gpu_device, "DEVICE", "cuda")
    assert gpu_device.names("moe_mlp") == ["triton@gpu"] and len(gpu_device.names("flow_step")) == 2
    assert [mark.name for mark in gpu_device.marked("moe_mlp", "triton@gpu").marks] == ["gpu"]
    assert not gpu_device.marked("moe_mlp", "triton").marks


def test_what_runs_on_a_gpu():
    """Collected as on a machine with one: every test that takes a backend, but for those left out, on each of ours."""
    files = ["tests/ops/test_gated_residual.py", "tests/ops/test_moe_mlp.py", "tests/ops/test_fuzz.py"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["UVG_TEST_DEVICE"] = "cuda"
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    runs = [re.search(r"test_(\w+)\.py\S*?(test_\w+)\[(\S+)\]", line) for line in told.splitlines() if "::" in line]
    found = {(run[1], run[2], part) for run in runs if run for part in run[3].split("-")}
    for op, own in (("gated_residual", {"cuda@gpu", "triton@gpu"}), ("moe_mlp", {"triton@gpu"})):
        asked = {name for module, name, part in found if module == op and part == "reference"} - gpu_device.NOT_MOVED
        assert len(asked) > 8
        for backend in own:
            assert {name for module, name, part in found if module == op and part == backend} == asked
    assert ("fuzz", "test_fuzzed", "triton@gpu") in found and ("fuzz", "test_fuzzed", "cuda@gpu") in found

"""Triton kernels as newer chips than sm_80 are given them, with tensor descriptors: values, under the interpreter and
on such a GPU."""

import contextlib

import gpu_device
import pytest
import test_flash_attention
import test_linear_cross_entropy
import test_linear_sample
import test_moe_mlp
import torch
from harness import BF16, Case

from uvg_engine.backends import triton as backend

if not backend.interpreting() and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from uvg_engine.kernels import flash_attention
from uvg_engine.kernels._launch import SM90, SM100, configured_for, recording

ON_GPU = not backend.interpreting()
HERE = [pytest.param(None, id="this GPU", marks=pytest.mark.gpu)]


def attention(g):
    """Two samples, video and text of each; whole blocks of keys and parts of one."""
    table = test_flash_attention.table(((0, 130), (160, 5)), ((130, 30), (165, 7)))
    return test_flash_attention.attention(g, 172, 172, table, table, 1, 32)


def mlp(g):
    """A group larger than a tile and a small one; whole blocks of what is summed over."""
    return test_moe_mlp.experts(g, (0, 130, 137), 64, 64)


RUNS = {
    "flash_attention": (test_flash_attention.TestFlashAttention, Case("descriptors", attention)),
    "linear_cross_entropy": (
        test_linear_cross_entropy.TestLinearCrossEntropy,
        test_linear_cross_entropy.case("descriptors", test_linear_cross_entropy.gkl, 130, 72, 300),
    ),
    "linear_sample": (test_linear_sample.TestLinearSample, test_linear_sample.case("descriptors", 130, 72, 300)),
    "moe_mlp": (test_moe_mlp.TestMoeMlp, Case("descriptors", mlp)),
}


@pytest.mark.parametrize("capability", HERE if ON_GPU else [SM90, SM100], ids=None if ON_GPU else ["sm90", "sm100"])
@pytest.mark.parametrize("op", RUNS)
def test_values(op, capability):
    """capability: whose kernels are interpreted; None: those of the GPU, on it."""
    suite, case = RUNS[op]
    chip = capability or torch.cuda.get_device_capability()
    if chip < SM90:
        pytest.skip("this GPU has no tensor descriptors")
    inputs = case.inputs(BF16)
    with gpu_device.forced("triton@gpu" if ON_GPU else "triton"):
        with recording(chip) as launches:
            suite().function(**inputs)
        assert any(launch.options.get("TMA") for launch in launches), "the case does not reach the descriptors"
        with configured_for(capability) if capability else contextlib.nullcontext():
            suite().assert_right(case, inputs, BF16, "triton")


@pytest.mark.skipif(ON_GPU, reason="looks at launches alone: under the interpreter")
@pytest.mark.parametrize("why", ["padded", "misaligned"])
def test_rows_that_no_descriptor_can_describe_take_pointers(why):
    rows, width = 40, {"padded": 24, "misaligned": 32}[why]
    spans = test_flash_attention.table(((0, rows),))
    memory = (
        torch.zeros(rows * width + 1, dtype=BF16)[1:] if why == "misaligned" else torch.zeros(rows * width, dtype=BF16)
    )
    q = memory.view(rows, 1, width)
    with recording(SM90) as launches:
        out, lse = flash_attention.forward(q, q, q, spans, spans, 0.125)
        flash_attention.query_pass(q, out, lse, q, q, q, spans, spans, 0.125)
        flash_attention.key_pass(q, lse, lse, q, q, q, spans, spans, 0.125)
    assert [launch.options["TMA"] for launch in launches] == [False] * 3
    aligned = torch.zeros(rows, 1, 32, dtype=BF16)
    with recording(SM90) as launches:
        flash_attention.forward(aligned, aligned, aligned, spans, spans, 0.125)
    assert launches[0].options["TMA"]

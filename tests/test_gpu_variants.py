"""What gpu_check compiles, counted without a GPU: by Triton's own key, and that the key is the one it compiles by."""

import json

import pytest
import torch

from uvg_engine import backends, ops
from uvg_engine.backends import triton as backend

pytest.importorskip("triton", reason="triton is not installed")
if backend.interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench import gpu_variants
from uvg_engine.kernels import gated_residual


def variants_of(*calls):
    """Names of the kernels that each call asks for in a variant of its own."""
    recorder, found = gpu_variants.Recorder(), []
    with gpu_variants.as_on_a_gpu(recorder.note), backends.force("triton"):
        for call in calls:
            before = set(recorder.variants)
            call()
            found.append(sorted(gpu_variants.name_of(v) for v in set(recorder.variants) - before))
    return found


def rows_of(count):
    """Row ops, a head, attention, forward and backward, of a batch with so many rows, in as many samples up to 3."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(count, 32, generator=g).requires_grad_() for _ in range(2))
    samples = min(count, 3)
    starts = torch.arange(samples, dtype=torch.int32)
    spans = torch.stack([starts, torch.ones_like(starts)], 1)
    gate = torch.randn(samples, 32, generator=g)
    head, bias = torch.randn(9, 32, generator=g), torch.zeros(9)
    out = ops.gated_residual(x, y, gate, spans)
    out = ops.modulated_layer_norm(out, gate, gate, spans)
    q = out.view(count, 2, 16)
    out = ops.flash_attention(q, q, q, spans[:, None], spans[:, None])[0].flatten(1)
    weights, experts = ops.moe_route(out[:, :4].contiguous(), 2)
    rows, _, order = ops.moe_dispatch(out, experts, 4)
    out = ops.moe_combine(rows, order, weights)
    loss = ops.linear_cross_entropy(out, head, bias, torch.zeros(count, dtype=torch.int64))
    torch.autograd.grad(loss.sum(), (x, y))


def test_a_batch_of_another_size_compiles_nothing_anew():
    """One row, 16, a prime, a multiple of 16 again: the same kernels, but for the one that spilled then."""
    first, *others = variants_of(*(lambda count=count: rows_of(count) for count in (17, 16, 1, 48)))
    assert len(first) > 15 and "flash_attention_fwd_kernel" in first
    assert len(others) == 3 and {name for new in others for name in new} == {"linear_cross_entropy_bwd_words_kernel"}


def test_what_is_counted_is_what_a_launch_asks_for():
    """A variant compiles for the chip, and stands then where Triton looks for it at that launch."""
    recorder = gpu_variants.Recorder()
    x, gate, spans = torch.ones(3, 8), torch.ones(1, 8), torch.tensor([[0, 3]], dtype=torch.int32)
    with gpu_variants.as_on_a_gpu(recorder.note), backends.force("triton"):
        recorder.at = "tests/ops/test_on_gpu.py::test_values[gated_residual-triton-one-float32]"
        assert torch.equal(ops.gated_residual(x, x, gate, spans), 2 * x), "the reference's results"
    (variant,) = recorder.variants
    compiled = gpu_variants.compile_variant(variant)
    assert compiled.variant == variant and not compiled.error and compiled.seconds > 0
    kept, *_ = gated_residual.gated_residual_fwd_kernel.device_caches[gpu_variants.TARGET]
    assert json.loads(variant)["key"] in kept
    lines = list(gpu_variants.report(recorder, [compiled]))
    assert f"  gated_residual, cases: 1, {compiled.seconds:.0f}" in lines


def test_faults_of_a_variant_are_told():
    recorder = gpu_variants.Recorder()
    recorder.variants[variant := json.dumps({"name": "uvg_engine.kernels.some.some_kernel"})].add("bench some")
    found = (
        gpu_variants.Compiled(variant, 1.0, stack=8, shared=300_000),
        gpu_variants.Compiled(variant, 1.0, error="E: no"),
    )
    *_, over, broken = gpu_variants.report(recorder, found)
    assert over == "some_kernel: 8 bytes spilled, 300000 bytes of shared memory (bench some)"
    assert broken == "some_kernel: E: no (bench some)"

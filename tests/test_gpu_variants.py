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

"""How tensors are handed to the kernels of the core: packed, by the core itself where they are small."""

import pytest
import torch
from test_plans import known, rows

from uvg_engine import backends, ops
from uvg_engine.backends import native
from uvg_engine.backends.cpu import _tensors
from uvg_engine.ops import _plans

pytestmark = pytest.mark.skipif(native.cpu() is None, reason="no native core")

LAYOUTS = {
    "packed": lambda x: x,
    "part of a row": lambda x: x[:, 3:5],
    "every second value": lambda x: x[:, ::2],
    "across": lambda x: x.T,
    "a row for all": lambda x: x[:1].expand(4, -1),
    "one value": lambda x: x[:1, :1].expand(3, 5),
    "a vector apart": lambda x: x[:, 2],
    "a number": lambda x: x[1, 2],
    "heads of a product": lambda x: x.view(6, 2, 2, 2)[:, 1],
    "heads across": lambda x: x.view(6, 2, 4).permute(2, 0, 1),
    "nothing": lambda x: x[2:2, ::2],
    "no columns": lambda x: x[::2, 2:2],
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16, torch.float16])
def test_packed_is_what_torch_makes(name, given, wanted, monkeypatch):
    values = 100 * rows(0, 6, 8)
    values[1, 2], values[0, 0], values[5, 7] = torch.inf, 1.00390625, -0.0  # the second lies half way in bf16
    values[3, 1], values[4, 4] = 3e-6, 70_000  # of fp16 subnormal, and beyond
    x = LAYOUTS[name](values.to(given))
    got, want = _tensors.packed(x, wanted), x.to(wanted or given).contiguous()
    assert got.dtype == want.dtype and got.is_contiguous() and torch.equal(got, want)
    if x.is_contiguous() and wanted in (None, given):
        assert got is x
    monkeypatch.setattr(_tensors, "_SMALL", 0)
    assert torch.equal(_tensors.packed(x, wanted), want)


def test_nan_stays():
    x = torch.tensor([[torch.nan, 1.0], [-torch.nan, 2.0]])
    for dtype in (torch.bfloat16, torch.float16):
        assert _tensors.packed(x[:, :1], dtype).isnan().all()
    assert _tensors.packed(None) is None


def test_bf16_and_fp16_do_not_meet_in_a_kernel():
    h, y = rows(0).bfloat16(), rows(1).half()
    for name, call in (
        ("gated_residual", lambda: ops.gated_residual(h, y)),
        ("gated_residual_norm", lambda: ops.gated_residual_norm(h, y)),
        ("gated_residual_norm", lambda: ops.gated_residual_norm(h, h, norm_dtype=torch.float16)),
    ):
        want = call()  # by another backend
        assert all(x.isfinite().all() for x in (want if isinstance(want, tuple) else (want,)))
        with backends.force("cpu"), pytest.raises(backends.BackendRefused, match=f"{name} .*bfloat16 beside float16"):
            call()


@pytest.mark.skipif(not _plans._begin(), reason="a torch without DLPack's functions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", [False, True])
def test_parts_of_a_modulation_and_of_a_product_have_plans(dtype, gradient, long_ways):
    given = rows(0), rows(1), rows(2, 6, 8), rows(3)[0], rows(4, 5, 3 * 8)
    h, y, modulation, weight, qkv = (x.to(dtype).requires_grad_(gradient) for x in given)
    spans, rows_of = torch.tensor([[0, 2], [2, 3]], dtype=torch.int32), torch.tensor([[[0, 5]]], dtype=torch.int32)

    def call():
        gate, shift, scale = modulation.view(2, 3, 8).unbind(1)
        out, normed = ops.gated_residual_norm(h, y, gate, spans, shift, scale, spans, weight=weight, bias=weight)
        normed = normed + ops.modulated_layer_norm(out, shift, scale, spans)
        q, k, v = qkv.view(5, 3, 2, 4).unbind(1)
        seen, _ = ops.flash_attention(q, k, v, rows_of, rows_of)
        together = ops.gated_residual(normed, seen.reshape(5, 8), gate, spans)
        if not gradient:
            return together
        return torch.autograd.grad(together, (h, y, modulation, weight, qkv), torch.ones_like(together))

    want = call()
    known(call)
    long_ways.clear()
    got = call()
    assert not long_ways
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)

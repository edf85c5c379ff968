"""Addresses past 2^31 elements: the last programs of a launch, on tensors whose memory is never touched elsewhere.

A tensor of 2^31 elements costs nothing until a page of it is written; only the programs at its end run here.
"""

import builtins
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton runs kernels without a GPU only where TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime import interpreter

from uvg_engine.kernels import (
    _launch,
    flash_attention,
    gated_residual,
    gated_residual_norm,
    modulated_layer_norm,
    moe_combine,
    qk_norm_rope,
)
from uvg_engine.reference import flash_attention as attention_truth
from uvg_engine.reference import gated_residual as gated_residual_truth
from uvg_engine.reference import gated_residual_norm as residual_norm_truth
from uvg_engine.reference import modulated_layer_norm as norm_truth
from uvg_engine.reference import qk_norm_rope as rope_truth

BF16, FP32 = torch.bfloat16, torch.float32
WIDTH = 4096
ROWS = 2**31 // WIDTH + 8
END = 8  # rows at the end that are compared; row ROWS - END begins at element 2^31


class Last(int):
    """A size of a grid of which only the programs of the last END rows run."""


def last_range(*bounds):
    if len(bounds) == 1 and isinstance(bounds[0], Last):
        return builtins.range(bounds[0] - max(1, END * bounds[0] // ROWS), bounds[0])
    return builtins.range(*bounds)


@pytest.fixture
def run_last(monkeypatch):
    """Calls a host function and runs the last programs of its launches, but for the sums over all partial sums."""
    monkeypatch.setattr(interpreter, "range", last_range, raising=False)

    def run(function, *args):
        with _launch.recording(_launch.SM80) as launches:
            result = function(*args)
        for launch in launches:
            if launch.name == "sum_partials_kernel":
                continue
            launch.kernel[(Last(launch.grid[0]), *launch.grid[1:])](*launch.args, **launch.options)
        return result

    return run


def huge(g, dtype=BF16):
    x = torch.empty(ROWS, WIDTH, dtype=dtype)
    x[-END:] = torch.randn(END, WIDTH, generator=g).to(dtype)
    return x


SPANS = torch.tensor([[0, ROWS - 3], [ROWS - 3, 3]], dtype=torch.int32)
ENDS = torch.tensor([[0, END - 3], [END - 3, 3]], dtype=torch.int32)


def close(got, want):
    torch.testing.assert_close(got[-END:], want, rtol=2e-2, atol=2e-2)


def test_gated_residual(run_last):
    g = torch.Generator().manual_seed(0)
    h, y, gate = huge(g), huge(g), torch.randn(2, WIDTH, generator=g)
    assert h[:-END].numel() >= 2**31
    ends = (h[-END:], y[-END:], gate, ENDS)
    close(run_last(gated_residual.forward, h, y, gate, SPANS), gated_residual_truth.forward(*ends))
    close(run_last(gated_residual.backward, h, h, y, gate, SPANS)[0], gated_residual_truth.backward(ends[0], *ends)[0])


def test_modulated_layer_norm(run_last):
    g = torch.Generator().manual_seed(0)
    x, shift, scale = huge(g), torch.randn(2, WIDTH, generator=g), torch.randn(2, WIDTH, generator=g)
    y, mean, rstd = run_last(modulated_layer_norm.forward, x, shift, scale, SPANS, None, None, 1e-6)
    ends = (x[-END:], shift, scale, ENDS, None, None, 1e-6)
    want = norm_truth.forward(*ends)
    close(y, want[0])
    dx = run_last(modulated_layer_norm.backward, x, mean, rstd, x, shift, scale, SPANS, None, None, 1e-6)[0]
    close(dx, norm_truth.backward(x[-END:], *want[1:], *ends)[0])


def test_gated_residual_norm(run_last):
    g = torch.Generator().manual_seed(0)
    h, y = huge(g), huge(g)
    parts = [torch.randn(2, WIDTH, generator=g) for _ in range(3)]
    out, normed, mean, rstd = run_last(gated_residual_norm.forward, h, y, *parts, SPANS, None, None, 1e-6, BF16)
    ends = (y[-END:], *parts, ENDS, None, None, 1e-6, BF16)
    want = residual_norm_truth.forward(h[-END:], *ends)
    close(out, want[0])
    close(normed, want[1])
    args = (y, *parts, SPANS, None, None, 1e-6, BF16)
    dh, dy, *_ = run_last(gated_residual_norm.backward, y, h, mean, rstd, out, *args)
    want_dh, want_dy, *_ = residual_norm_truth.backward(y[-END:], h[-END:], *want[2:], want[0], *ends)
    close(dh, want_dh)
    close(dy, want_dy)


@pytest.mark.parametrize("kind", [0, 1])
def test_qk_norm_rope(run_last, kind):
    g = torch.Generator().manual_seed(0)
    q, weight, table = huge(g), torch.ones(WIDTH), torch.randn(2, END, 64, 2, generator=g)
    spans = torch.tensor([[ROWS - END, END, kind, 2, 2, 2]], dtype=torch.int32)
    args = (weight, weight, spans, table, WIDTH // 128, 1e-6)
    q_out, k_out, *rstd = run_last(qk_norm_rope.forward, q, q, *args)
    ends = (q[-END:], q[-END:], weight, weight, torch.tensor([[0, END, kind, 2, 2, 2]]), table, WIDTH // 128, 1e-6)
    want = rope_truth.forward(*ends)
    close(q_out, want[0])
    close(k_out, want[1])
    dq = run_last(qk_norm_rope.backward, q, q, *rstd, q, q, *args)[0]
    close(dq, rope_truth.backward(q[-END:], q[-END:], *want[2:], *ends)[0])


def test_moe_combine(run_last):
    """Every row stays where it is: one choice each."""
    g = torch.Generator().manual_seed(0)
    x = huge(g)
    order, weights = torch.arange(ROWS, dtype=torch.int32), torch.full((ROWS, 1), 0.5)
    out = run_last(moe_combine.forward, x, order, weights)
    assert torch.equal(out[-END:], 0.5 * x[-END:])
    assert torch.equal(run_last(moe_combine.backward, x, x, order, weights)[0][-END:], 0.5 * x[-END:])


@pytest.fixture
def run_first():
    """Calls a host function and runs the first program of each launch."""

    def run(function, *args):
        with _launch.recording(_launch.SM80) as launches:
            result = function(*args)
        for launch in launches:
            launch.kernel[(1,) * len(launch.grid)](*launch.args, **launch.options)
        return result

    return run


def test_attention(run_first, run_last):
    """One span at the end, 32 heads of 128: the first tile's rows begin at element 2^31."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (huge(g).unflatten(1, (32, 128)) for _ in range(3))
    spans = torch.tensor([[[ROWS - END, END]]], dtype=torch.int32)
    out, lse = run_first(flash_attention.forward, q, k, v, spans, spans, 0.125)
    end = [x[-END:, :1].clone() for x in (q, k, v)]
    own = torch.tensor([[[0, END]]], dtype=torch.int32)
    want, want_lse = attention_truth.forward(*end, own, own, 0.125)
    torch.testing.assert_close(out[-END:, :1], want, rtol=0.02, atol=0.01)
    torch.testing.assert_close(lse[:1, -END:], want_lse)
    dq, delta = run_first(flash_attention.query_pass, out, out, lse, q, k, v, spans, spans, 0.125)
    want_dq, *want_rest = attention_truth.backward(want, want, want_lse, *end, own, own, 0.125)
    torch.testing.assert_close(dq[-END:, :1], want_dq, rtol=0.02, atol=0.02)
    rest = run_last(flash_attention.key_pass, out, lse, delta, q, k, v, spans, spans, 0.125)
    for got, wanted in zip(rest, want_rest, strict=True):
        torch.testing.assert_close(got[-END:, :1], wanted, rtol=0.02, atol=0.05)

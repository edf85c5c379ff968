"""Addresses past 2^31 elements of the row ops, attention and routing: the programs at the end of their tensors."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton runs kernels without a GPU only where TRITON_INTERPRET=1", allow_module_level=True)

from far_memory import ALL, BF16, END, LAST, run_part, with_end

from uvg_engine.kernels import (
    flash_attention,
    gated_residual,
    gated_residual_norm,
    modulated_layer_norm,
    moe_combine,
    moe_dispatch,
    moe_route,
    qk_norm_rope,
    window_attention,
)
from uvg_engine.reference import flash_attention as attention_truth
from uvg_engine.reference import gated_residual as gated_residual_truth
from uvg_engine.reference import gated_residual_norm as residual_norm_truth
from uvg_engine.reference import modulated_layer_norm as norm_truth
from uvg_engine.reference import moe_route as route_truth
from uvg_engine.reference import qk_norm_rope as rope_truth
from uvg_engine.reference import window_attention as window_truth

__all__ = ["run_part"]
WIDTH = 4096
ROWS = 2**24 + END  # partial sums of 32 rows are far too; row ROWS - END begins at element 2^36
ROWS_OF_A_PROGRAM = slice(-END, None)  # where a program has one row: those of the last END

SPANS = torch.tensor([[0, ROWS - 3], [ROWS - 3, 3]], dtype=torch.int32)
ENDS = torch.tensor([[0, END - 3], [END - 3, 3]], dtype=torch.int32)


def close(got, want):
    torch.testing.assert_close(got[-END:], want, rtol=2e-2, atol=2e-2)


def close_sums(got, want):
    """Sums over the last span, which begins in the last block of rows; and over all rows, which are zero before."""
    torch.testing.assert_close(got[-1], want[-1], rtol=2e-2, atol=5e-2)


def made():
    """(generator, maker of far rows, maker of numbers)."""
    g = torch.Generator().manual_seed(0)

    def rows(width=WIDTH):
        return with_end(torch.randn(END, width, generator=g).to(BF16), ROWS, width)

    return rows, lambda *shape: torch.randn(*shape, generator=g)


def test_gated_residual(run_part):
    rows, normal = made()
    h, y, gate = rows(), rows(), normal(2, WIDTH)
    ends = (h[-END:], y[-END:], gate, ENDS)
    out = run_part(gated_residual.forward, h, y, gate, SPANS, gated_residual_fwd=(ROWS_OF_A_PROGRAM,))
    close(out, gated_residual_truth.forward(*ends))
    got, want = run_part(gated_residual.backward, h, h, y, gate, SPANS), gated_residual_truth.backward(ends[0], *ends)
    close(got[0], want[0])
    close_sums(got[1], want[1])


@pytest.mark.parametrize("modulated, affine", [(True, True), (True, False), (False, True)])
def test_modulated_layer_norm(run_part, modulated, affine):
    """The backward in parts of a row, and with whole rows."""
    rows, normal = made()
    x, dy = rows(), rows()
    parts = (normal(2, WIDTH), normal(2, WIDTH)) if modulated else (None, None)
    affine = (normal(WIDTH), normal(WIDTH)) if affine else (None, None)
    spans, end_spans = (SPANS, ENDS) if modulated else (None, None)
    chosen = {"modulated_layer_norm_fwd": (ROWS_OF_A_PROGRAM,)}
    y, mean, rstd = run_part(modulated_layer_norm.forward, x, *parts, spans, *affine, 1e-6, **chosen)
    ends = (x[-END:], *parts, end_spans, *affine, 1e-6)
    want = norm_truth.forward(*ends)
    close(y, want[0])
    got = run_part(modulated_layer_norm.backward, dy, mean, rstd, x, *parts, spans, *affine, 1e-6)
    wanted = norm_truth.backward(dy[-END:], *want[1:], *ends)
    close(got[0], wanted[0])
    if modulated:
        for a, b in zip(got[1:3], wanted[1:3], strict=True):
            close_sums(a, b)
    for a, b in zip(got[3:], wanted[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-2)


def test_gated_residual_norm(run_part):
    rows, normal = made()
    h, y, dout, dnormed = rows(), rows(), rows(), rows()
    parts = [normal(2, WIDTH) for _ in range(3)]
    affine = (normal(WIDTH), normal(WIDTH), 1e-6, BF16)
    chosen = {"gated_residual_norm_fwd": (ROWS_OF_A_PROGRAM,)}
    out, normed, mean, rstd = run_part(gated_residual_norm.forward, h, y, *parts, SPANS, *affine, **chosen)
    ends = (y[-END:], *parts, ENDS, *affine)
    want = residual_norm_truth.forward(h[-END:], *ends)
    close(out, want[0])
    close(normed, want[1])
    got = run_part(gated_residual_norm.backward, dout, dnormed, mean, rstd, out, y, *parts, SPANS, *affine)
    wanted = residual_norm_truth.backward(dout[-END:], dnormed[-END:], *want[2:], want[0], *ends)
    for i in range(2):
        close(got[i], wanted[i])
    for a, b in zip(got[2:5], wanted[2:5], strict=True):
        close_sums(a, b)
    for a, b in zip(got[5:], wanted[5:], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("heads, head", [(32, 128), (79, 52)], ids=["whole rows", "in parts"])
@pytest.mark.parametrize("kind", [0, 1])
def test_qk_norm_rope(run_part, kind, heads, head):
    rows, normal = made()
    width = heads * head
    q, k, weight, table = rows(width), rows(width), normal(width), normal(2, END, head // 2, 2)
    spans = torch.tensor([[ROWS - END, END, kind, 2, 2, 2]], dtype=torch.int32)
    args = (weight, weight, spans, table, heads, 1e-6)
    q_out, k_out, *rstd = run_part(qk_norm_rope.forward, q, k, *args)
    ends = (q[-END:], k[-END:], weight, weight, torch.tensor([[0, END, kind, 2, 2, 2]]), table, heads, 1e-6)
    want = rope_truth.forward(*ends)
    close(q_out, want[0])
    close(k_out, want[1])
    got = run_part(qk_norm_rope.backward, q, k, *rstd, q, k, *args)
    wanted = rope_truth.backward(q[-END:], k[-END:], *want[2:], *ends)
    for a, b in zip(got[:2], wanted[:2], strict=True):
        close(a, b)
    for a, b in zip(got[2:], wanted[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-2)


def test_moe_combine(run_part):
    """Every row stays where it is: one choice each."""
    x = made()[0]()
    order, weights = torch.arange(ROWS, dtype=torch.int32), torch.full((ROWS, 1), 0.5)
    chosen = {"sum_choices": (ROWS_OF_A_PROGRAM,), "moe_combine_bwd": (ROWS_OF_A_PROGRAM,)}
    out = run_part(moe_combine.forward, x, order, weights, **chosen)
    assert torch.equal(out[-END:], 0.5 * x[-END:])
    drows, dweights = run_part(moe_combine.backward, x, x, order, weights, **chosen)
    assert torch.equal(drows[-END:], 0.5 * x[-END:])
    close(dweights, x[-END:].float().square().sum(1, keepdim=True))


def test_moe_dispatch(run_part):
    """Only the last block of slots is counted: its rows come first. The last grouped rows copy row 0."""
    rows, width, experts = 2**26 + END, 64, 4096
    g = torch.Generator().manual_seed(0)
    x = with_end(torch.randn(END, width, generator=g).to(BF16), rows, width)
    x[0] = torch.arange(width)
    choice = with_end(torch.tensor([5, 3, 5, 4095, 0, 3, 3, 7], dtype=torch.int32), rows, 1)
    chosen = {"copy_rows": (slice(None, None, rows // END - 1),)}  # 8 rows a program: the first and the last
    grouped, offsets, order = run_part(moe_dispatch.forward, x, choice, experts, **chosen)
    sorted_choice, places = choice[-END:, 0].sort(stable=True)
    assert torch.equal(order[:END], (places + rows - END).int())
    counted = torch.bincount(sorted_choice, minlength=experts).cumsum(0).int()
    assert torch.equal(offsets, torch.cat([torch.zeros(1, dtype=torch.int32), counted]))
    assert torch.equal(grouped[:END], x[-END:][places])
    assert torch.equal(grouped[-END:], x[:1].expand(END, -1))
    back = torch.arange(rows, dtype=torch.int32)
    dx = run_part(moe_dispatch.backward, x, back, x, choice, experts)
    assert torch.equal(dx[-END:], x[-END:])


def test_moe_route(run_part):
    rows, experts = 2**19 + END, 4096
    g = torch.Generator().manual_seed(0)
    logits = with_end(torch.randn(END, experts, generator=g).to(BF16), rows, experts)
    chosen = {"moe_route_fwd": (ROWS_OF_A_PROGRAM,), "moe_route_bwd": (ROWS_OF_A_PROGRAM,)}
    weights, choice = run_part(moe_route.forward, logits, 2, **chosen)
    want_weights, want_choice = route_truth.forward(logits[-END:], 2)
    close(weights, want_weights)
    assert torch.equal(choice[-END:], want_choice)
    dweights = with_end(torch.randn(END, 2, generator=g), rows, 2)
    dlogits = run_part(moe_route.backward, dweights, weights, choice, logits, 2, **chosen)
    close(dlogits, route_truth.backward(dweights[-END:], want_weights, want_choice, logits[-END:], 2))


KEYS, HEADS, HEAD = 2**30 + END, 3, 16  # the statistics of the last head are far too


def attention_inputs():
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(END, HEADS, HEAD, generator=g).to(BF16) for _ in range(4)]
    return [with_end(end, KEYS, HEADS, HEAD) for end in made], [end[:, -1:] for end in made]


def at_last_head(x):
    return x[-END:, -1:]


def test_flash_attention(run_part):
    """One span before the last rows, which lie in none; the last head."""
    (q, k, v, dout), (*ends, dout_end) = attention_inputs()
    count = END - 3
    spans = torch.tensor([[[KEYS - END, count]]], dtype=torch.int32)
    own = torch.tensor([[[0, count]]], dtype=torch.int32)
    ends_of_grid = (slice(None, None, (KEYS - 1) // 128), LAST)  # tiles of 128: the span's, and that of the idle rows
    chosen = dict.fromkeys(("flash_attention_fwd", "flash_attention_bwd_query"), ends_of_grid)
    chosen["flash_attention_bwd_key"] = (LAST, LAST)
    out, lse = run_part(flash_attention.forward, q, k, v, spans, spans, 0.125, **chosen)
    want, want_lse = attention_truth.forward(*ends, own, own, 0.125)
    torch.testing.assert_close(at_last_head(out), want, rtol=0.02, atol=0.01)
    torch.testing.assert_close(lse[-1:, -END:], want_lse)
    got = run_part(flash_attention.backward, dout, out, lse, q, k, v, spans, spans, 0.125, **chosen)
    wanted = attention_truth.backward(dout_end, want, want_lse, *ends, own, own, 0.125)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(at_last_head(a), b, rtol=0.02, atol=0.05)


def test_window_attention(run_part, monkeypatch):
    """Two blocks of two video rows, then four text rows, at the end; the last head."""
    (q, k, v, dout), (*ends, dout_end) = attention_inputs()
    video, text = (KEYS - END, 1, 2, 2), (KEYS - 4, 4)
    tables = [torch.tensor([each], dtype=torch.int32) for each in (video, text)]
    own = torch.tensor([[0, 1, 2, 2]], dtype=torch.int32), torch.tensor([[4, 4]], dtype=torch.int32)
    numbers = (1, 1, 2), (0, 0, 0), 0.125
    monkeypatch.setattr(window_attention, "programs", lambda device, held: 2 * HEADS)  # one a block and head
    tiles = dict.fromkeys(("flash_attention_fwd", "flash_attention_bwd_query"), (slice(1), LAST))
    chosen = {**tiles, "flash_attention_bwd_key": (LAST, LAST), "window_attention_spans": (ALL,)}
    two = slice(-2, None)
    chosen |= {f"window_attention_{name}": (two,) for name in ("fwd", "bwd_query", "bwd_key")}
    out, lse = run_part(window_attention.forward, q, k, v, *tables, *numbers, **chosen)
    want, want_lse = window_truth.forward(*ends, *own, *numbers)
    torch.testing.assert_close(at_last_head(out), want, rtol=0.02, atol=0.01)
    torch.testing.assert_close(lse[-1:, -END:], want_lse)
    got = run_part(window_attention.backward, dout, out, lse, q, k, v, *tables, *numbers, **chosen)
    wanted = window_truth.backward(dout_end, want, want_lse, *ends, *own, *numbers)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(at_last_head(a), b, rtol=0.02, atol=0.05)

"""Addresses past 2^31 elements: the last block of every launch, on tensors whose memory is never touched elsewhere.

A tensor of 2^31 elements costs nothing until a page of it is written; what was not written is zero.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import cuda_simulator
import pytest
import torch
from harness import BF16, FP32, normal
from torch import Tensor

from uvg_engine.backends.cuda import (
    _tensors,
    flash_attention,
    flow_noise,
    flow_step,
    gated_residual,
    gated_residual_norm,
    linear_sample,
    modulated_layer_norm,
    moe_combine,
    moe_dispatch,
    moe_route,
    qk_norm_rope,
)
from uvg_engine.reference import flash_attention as flash_attention_truth
from uvg_engine.reference import flow_noise as flow_noise_truth
from uvg_engine.reference import flow_step as flow_step_truth
from uvg_engine.reference import gated_residual as gated_residual_truth
from uvg_engine.reference import gated_residual_norm as gated_residual_norm_truth
from uvg_engine.reference import modulated_layer_norm as modulated_layer_norm_truth
from uvg_engine.reference import moe_route as moe_route_truth
from uvg_engine.reference import qk_norm_rope as qk_norm_rope_truth

pytestmark = [
    pytest.mark.skipif(cuda_simulator.module() is None, reason="the simulator was not built"),
    pytest.mark.skipif(os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE < 20 << 30, reason="17 GB are reserved at a time"),
]

LIMIT = 2**31
WIDTH = 32768  # the widest row in bf16
END = 8  # rows beyond LIMIT
ROWS = LIMIT // WIDTH + END
SPANS = torch.tensor([[0, ROWS - 3], [ROWS - 3, 3]], dtype=torch.int32)
ENDS = torch.tensor([[0, END - 3], [END - 3, 3]], dtype=torch.int32)
SUMMED = 128  # columns of the last block of column_totals_kernel


@pytest.fixture(autouse=True)
def last_blocks() -> Iterator[None]:
    simulator = cuda_simulator.module()
    simulator.set_last_block_only(True)
    try:
        with cuda_simulator.running():
            yield
    finally:
        simulator.set_last_block_only(False)


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Zeros that take no memory, also where there is not so much."""
    count, bytes_each = torch.Size(shape).numel(), torch.empty(0, dtype=dtype).element_size()
    no_reserve = 0x4000  # MAP_NORESERVE, which mmap names from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, max(1, count) * bytes_each, flags), dtype=dtype)[:count].view(shape)


def huge(g: torch.Generator, *shape: int, dtype: torch.dtype = BF16, end: int = END) -> Tensor:
    """Zeros, and random numbers in the last `end` rows; element LIMIT is among them or beyond."""
    x = empty(*shape, dtype=dtype)
    assert x[:-1].numel() >= LIMIT
    x[-end:] = normal(g, end, *shape[1:]).to(dtype)
    return x


def close(got: Tensor, want: Tensor, atol: float = 2e-2) -> None:
    """The last block's part of `got`, of which `want` is the end."""
    assert got.abs().sum() > 0
    torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=atol)


def test_gated_residual():
    g = torch.Generator().manual_seed(0)
    h, y, gate = huge(g, ROWS, WIDTH), huge(g, ROWS, WIDTH), normal(g, 2, WIDTH).float()
    ends = (h[-END:], y[-END:], gate, ENDS)
    close(gated_residual.forward(h, y, gate, SPANS)[-1], gated_residual_truth.forward(*ends)[-1])
    dy, dgate = gated_residual.backward(h, h, y, gate, SPANS)
    want, want_gate = gated_residual_truth.backward(h[-END:], *ends)
    close(dy[-1], want[-1])
    close(dgate[-1, -SUMMED:], want_gate[-1, -SUMMED:])


def test_modulated_layer_norm():
    g = torch.Generator().manual_seed(0)
    x, dy = huge(g, ROWS, WIDTH), huge(g, ROWS, WIDTH)
    shift, scale = (normal(g, 2, WIDTH).float() for _ in range(2))
    weight, bias = (normal(g, WIDTH).float() for _ in range(2))
    rest, ends = (shift, scale, SPANS, weight, bias, 1e-6), (shift, scale, ENDS, weight, bias, 1e-6)
    y, mean, rstd = modulated_layer_norm.forward(x, *rest)
    want, want_mean, want_rstd = modulated_layer_norm_truth.forward(x[-END:], *ends)
    close(y[-1], want[-1])
    mean[-END:], rstd[-END:] = want_mean, want_rstd  # of the other blocks' rows
    dx, *grads = modulated_layer_norm.backward(dy, mean, rstd, x, *rest)
    want = modulated_layer_norm_truth.backward(dy[-END:], want_mean, want_rstd, x[-END:], *ends)
    close(dx[-1], want[0][-1])
    for got, wanted in zip(grads, want[1:], strict=True):
        close(got[..., -SUMMED:].view(-1, SUMMED)[-1], wanted[..., -SUMMED:].view(-1, SUMMED)[-1])


def test_more_parameters_of_spans_than_2_to_31():
    """And sums of as many chunks. Spans overlap here, so that few rows do."""
    g = torch.Generator().manual_seed(0)
    x, dy, shift, scale = (normal(g, END, WIDTH).to(BF16) for _ in range(4))
    spans = torch.tensor([[0, 1]], dtype=torch.int32).repeat(ROWS, 1)
    spans[-1] = torch.tensor([END - 1, 1])
    shifts, scales = empty(ROWS, WIDTH, dtype=FP32), empty(ROWS, WIDTH, dtype=FP32)
    shifts[-1], scales[-1] = shift[-1], scale[-1]
    own = torch.tensor([[0, END]], dtype=torch.int32)
    ends = (shift[-1:].float(), scale[-1:].float(), own, None, None, 1e-6)
    y, mean, rstd = modulated_layer_norm.forward(x, shifts, scales, spans, None, None, 1e-6)
    want, mean, rstd = modulated_layer_norm_truth.forward(x, *ends)
    close(y[-1], want[-1])
    dx, dshift, dscale, *_ = modulated_layer_norm.backward(dy, mean, rstd, x, shifts, scales, spans, None, None, 1e-6)
    close(dx[-1], modulated_layer_norm_truth.backward(dy, mean, rstd, x, *ends)[0][-1])
    alone = (torch.tensor([[END - 1, 1]], dtype=torch.int32), None, None, 1e-6)
    want = modulated_layer_norm_truth.backward(dy, mean, rstd, x, *ends[:2], *alone)
    close(dshift[-1, -SUMMED:], want[1][0, -SUMMED:])
    close(dscale[-1, -SUMMED:], want[2][0, -SUMMED:])


def test_gated_residual_norm():
    g = torch.Generator().manual_seed(0)
    h, y = huge(g, ROWS, WIDTH), huge(g, ROWS, WIDTH)
    parts = [normal(g, 2, WIDTH).float() for _ in range(3)]
    out, normed, mean, rstd = gated_residual_norm.forward(h, y, *parts, SPANS, None, None, 1e-6, BF16)
    ends = (y[-END:], *parts, ENDS, None, None, 1e-6, BF16)
    want = gated_residual_norm_truth.forward(h[-END:], *ends)
    close(out[-1], want[0][-1])
    close(normed[-1], want[1][-1])
    for made, wanted in zip((out, mean, rstd), (want[0], *want[2:]), strict=True):
        made[-END:] = wanted
    args = (y, *parts, SPANS, None, None, 1e-6, BF16)
    dh, dy, *grads = gated_residual_norm.backward(y, h, mean, rstd, out, *args)
    want = gated_residual_norm_truth.backward(y[-END:], h[-END:], *want[2:], want[0], *ends)
    close(dh[-1], want[0][-1])
    close(dy[-1], want[1][-1])
    for got, wanted in zip(grads[1:3], want[3:5], strict=True):  # dgate: its block reads means of all rows of the span
        close(got[-1, -SUMMED:], wanted[-1, -SUMMED:])


@pytest.mark.parametrize("kind", [0, 1])
def test_qk_norm_rope(kind):
    g = torch.Generator().manual_seed(0)
    q, k, dk = (huge(g, ROWS, WIDTH) for _ in range(3))
    weight, table = 1 + normal(g, WIDTH).float(), normal(g, 2, END, 64, 2).float()
    spans = torch.tensor([[ROWS - END, END, kind, 2, 2, 2]], dtype=torch.int32)
    rest = (weight, weight, spans, table, WIDTH // 128, 1e-6)
    _, k_out, rstd_q, rstd_k = qk_norm_rope.forward(q, k, *rest)
    end = torch.tensor([[0, END, kind, 2, 2, 2]], dtype=torch.int32)
    ends = (q[-END:], k[-END:], weight, weight, end, table, WIDTH // 128, 1e-6)
    want = qk_norm_rope_truth.forward(*ends)
    close(k_out[-1], want[1][-1])
    rstd_k.zero_()
    rstd_k[-END:] = want[3]
    _, dx, _, dweight = qk_norm_rope.backward(dk, dk, rstd_q, rstd_k, q, k, *rest)
    want = qk_norm_rope_truth.backward(dk[-END:], dk[-END:], *want[2:], *ends)
    close(dx[-1], want[1][-1])
    close(dweight[-SUMMED:], want[3][-SUMMED:])


def test_flash_attention():
    """The second of two samples, by the last head: its rows, and its lse, lie beyond LIMIT."""
    g = torch.Generator().manual_seed(0)
    rows, heads, width = LIMIT // 65535 + 1 + END, 65535, 8
    q, k, v, dout, out, dq, dk, dv = (empty(rows, heads, width) for _ in range(8))
    lse, delta = (empty(heads, rows, dtype=FP32) for _ in range(2))
    assert rows * (heads - 1) >= LIMIT and (rows - END) // 64 + 2 == rows // 64 + 2 and (rows - END) % 64
    end = [normal(g, END, 1, width).to(BF16) for _ in range(4)]
    for x, values in zip((q, k, v, dout), end, strict=True):
        x[-END:, -1:] = values
    spans = torch.tensor([[[0, rows - END]], [[rows - END, END]]], dtype=torch.int32)
    keys = torch.tensor([[[0, 0]], [[rows - END, END]]], dtype=torch.int32)
    fields = flash_attention._fields(q, k, v, spans, keys, 0.25)
    own = torch.tensor([[[0, END]]], dtype=torch.int32)
    _tensors.launch("flash_attention_forward", q, **fields, out=out, lse=lse)
    want, want_lse = flash_attention_truth.forward(*end[:3], own, own, 0.25)
    close(out[-END:, -1:], want)
    torch.testing.assert_close(lse[-1, -END:], want_lse[0], rtol=1e-4, atol=1e-4)
    out[-END:, -1:], lse[-1, -END:] = want, want_lse[0]
    want_delta = (end[3].float() * want.float()).sum(-1)[:, 0]
    delta[-1, -END:-1] = want_delta[:-1]  # the last block of the launch has two rows
    saved = {"out": out, "lse": lse, "dout": dout, "delta": delta}
    _tensors.launch("flash_attention_backward", q, **fields, **saved, dq=dq, dk=dk, dv=dv)
    truth = flash_attention_truth.backward(end[3], want, want_lse, *end[:3], own, own, 0.25)
    torch.testing.assert_close(delta[-1, -END:], want_delta)
    for got, wanted in zip((dq, dk, dv), truth, strict=True):
        close(got[-END:, -1:], wanted)


def test_moe_route():
    g, experts = torch.Generator().manual_seed(0), 16384
    rows = LIMIT // experts + END
    logits = huge(g, rows, experts)
    weights, chosen = moe_route.forward(logits, 2)
    want, want_chosen = moe_route_truth.forward(logits[-END:], 2)
    assert torch.equal(chosen[-END:], want_chosen)
    close(weights[-END:], want)
    dweights = normal(g, rows, 2).float()
    got = moe_route.backward(dweights, weights, chosen, logits, 2)
    close(got[-END:], moe_route_truth.backward(dweights[-END:], want, want_chosen, logits[-END:], 2), 1e-3)


def test_moe_dispatch_and_combine():
    """One choice each: every row stays where it is."""
    g = torch.Generator().manual_seed(0)
    x = huge(g, ROWS, WIDTH)
    grouped, _, order = moe_dispatch.forward(x, torch.zeros(ROWS, 1, dtype=torch.int32), 1)
    assert torch.equal(grouped[-END:], x[-END:]) and int(order[-1]) == ROWS - 1
    order, weights = torch.arange(ROWS, dtype=torch.int32), torch.full((ROWS, 1), 0.5)
    assert torch.equal(moe_dispatch.backward(x, order, x, order[:, None], 1)[-END:], x[-END:])
    assert torch.equal(moe_combine.forward(x, order, weights)[-END:], 0.5 * x[-END:])
    dgrouped, dweights = moe_combine.backward(x, x, order, weights)
    assert torch.equal(dgrouped[-END:], 0.5 * x[-END:])
    close(dweights[-END:, 0], x[-END:].float().square().sum(1))


def test_linear_sample():
    """Rows of x, words, and the weights of panels of words."""
    g, width = torch.Generator().manual_seed(0), 8192
    rows = vocab = LIMIT // width + END
    x, weight = huge(g, rows, width), empty(vocab, width)
    weight[-1] = x[-1]
    ids = torch.zeros(rows, dtype=torch.int64)
    fields = {"x": x, "weight": weight, "bias": empty(vocab), "seeds": ids, "steps": ids, "tokens": ids}
    made = torch.full((rows,), -2)
    weighed = empty(rows, -(-vocab // linear_sample.PANEL), 2, dtype=FP32)
    assert weighed[:-1].numel() >= LIMIT
    sizes = {"rows": rows, "width": width, "vocab": vocab, "dtype": BF16, "temperature": 0.0}
    _tensors.launch("linear_sample_forward", x, **fields, **sizes, ids=made, weighed=weighed)
    assert int(made[-1]) == vocab - 1
    torch.testing.assert_close(weighed[-1, -1, 0], x[-1].float().square().sum(), rtol=1e-4, atol=0)


STREAM = LIMIT + 600  # its sample begins before LIMIT, as far as int32 tells, and ends beyond
START = LIMIT - 600


@pytest.mark.parametrize("tokens", [0, STREAM])
def test_flow_noise(tokens):
    g, latents = torch.Generator().manual_seed(0), STREAM - tokens
    data, words = empty(latents), empty(tokens, dtype=torch.int64)
    data[-2048:], words[-2048:] = normal(g, min(latents, 2048)).to(BF16), torch.arange(min(tokens, 2048))
    numbers = (torch.full((1,), 0.3), torch.full((1,), 0.5), torch.tensor([7]), 3)
    at = {n: torch.tensor([[START, n - START]] if n else [[0, 0]], dtype=torch.int32) for n in (latents, tokens)}
    x, velocity, noisy = flow_noise.forward(data, words, *numbers, at[latents], at[tokens], 1000)
    own = {n: torch.tensor([[0, max(0, n - START)]], dtype=torch.int32) for n in (latents, tokens)}
    ends = (data[START:], words[START:], *numbers, own[latents], own[tokens], 1000)
    want = flow_noise_truth.forward(*ends)
    for got, wanted in zip((x, velocity), want, strict=False):
        torch.testing.assert_close(got[-200:], wanted[-200:], rtol=2e-2, atol=2e-2)
    assert torch.equal(noisy[-64:], want[2][-64:])


@pytest.mark.parametrize("tokens", [0, STREAM])
def test_flow_step(tokens):
    g, latents = torch.Generator().manual_seed(0), STREAM - tokens
    x, v = empty(latents), empty(latents)
    words, drawn = (empty(tokens, dtype=torch.int64) for _ in range(2))
    x[-2048:], v[-2048:] = (normal(g, min(latents, 2048)).to(BF16) for _ in range(2))
    words[-2048:], drawn[-2048:] = torch.arange(min(tokens, 2048)), -torch.arange(min(tokens, 2048))
    at = {n: torch.tensor([[START, n - START]] if n else [[0, 0]], dtype=torch.int32) for n in (latents, tokens)}
    own = {n: torch.tensor([[0, max(0, n - START)]], dtype=torch.int32) for n in (latents, tokens)}
    coefs = torch.tensor([[0.5, 1.0, 0, 0, 0, 0, 1.0, 0, 0, 0.25]])
    steps = (torch.full((1,), 0.5), torch.tensor([7]), torch.tensor([3]))

    def step(run, x, v, words, drawn, spans):
        history = (None, torch.ones(1), coefs, None, None, None)
        return run(x, v, *history, spans[latents], words, drawn, *steps, spans[tokens])

    got = step(flow_step.forward, x, v, words, drawn, at)
    want = step(flow_step_truth.forward, x[START:], v[START:], words[START:], drawn[START:], own)
    for mine, wanted in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(mine[-200:], wanted[-200:], rtol=2e-2, atol=2e-2)
    assert torch.equal(got[3][-64:], want[3][-64:])

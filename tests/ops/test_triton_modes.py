"""Every op in one function inside torch.compile, activation checkpointing and autocast gives the bits of a plain call:
on the triton backend under its interpreter, on a GPU also where cuda serves what it has."""

import functools

import pytest
import torch
from gpu_device import OWN
from harness import BF16, spans
from torch.utils.checkpoint import checkpoint

from uvg_engine import ops
from uvg_engine.backends import triton

DEVICE = "cpu" if triton.interpreting() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SERVED_BY = ("triton",) if DEVICE == "cpu" else ("triton", ",".join(OWN))
SPANS, LATENTS = spans((0, 3), (3, 4)), spans((0, 48), (48, 64))
ROPE = spans((0, 3, 1, 0, 0, 0), (3, 4, 0, 1, 2, 2))
GRID, TEXT = spans((3, 1, 2, 2)), spans((0, 3))
TURNS = torch.randn(2, 4, 4, 2, generator=torch.Generator().manual_seed(1))
NUMBERS = torch.arange(7), torch.arange(2), torch.full((2,), 0.5), torch.ones(2, 10)


def block(tables, h, y, gate, shift, scale, weight, w1, w2, head):
    """Every op."""
    spans, latents, rope, grid, text, turns, target, names, half, coefs = tables
    h = ops.gated_residual(h, y, gate, spans)
    h, normed = ops.gated_residual_norm(h, y, gate, spans, shift, scale, spans)
    normed = ops.modulated_layer_norm(normed, shift, scale, spans)
    q, k = (x.view(7, 2, 8) for x in ops.qk_norm_rope(normed, normed, weight, weight, rope, turns, 2))
    samples = spans[:, None]
    seen = ops.flash_attention(q, k, k, samples, samples)[0].flatten(1)
    near = ops.window_attention(q, k, k, grid, text, tile=(1, 1, 2), radius=(0, 1, 0))[0].flatten(1)
    weights, experts = ops.moe_route(normed[:, :3], 2)
    rows, offsets, order = ops.moe_dispatch(seen + near, experts, 3)
    rows = ops.moe_mlp(rows, w1, w1[:, :, 0].contiguous(), w2, w2[:, :, 0].contiguous(), offsets)
    mixed = ops.moe_combine(rows, order, weights)
    bias, counters = head[:, 0].contiguous(), (target, target + 1, target + 2)
    ids = ops.linear_sample(mixed, head, bias, *counters)
    rows, coefs = h.flatten().detach(), coefs + gate[:, :10].detach()
    x, velocity, noisy = ops.flow_noise(rows, ids, half, half, names, 3, latents, spans, 9)
    less = 0.5 * rows
    stepped = ops.flow_step(
        x, velocity, less, half, coefs, less, less, less, latents, noisy, ids, half, names, names, spans
    )
    return h, mixed, ops.linear_cross_entropy(mixed, head, bias, target), ids, *stepped


@functools.cache
def tables():
    return tuple(x.to(DEVICE) for x in (SPANS, LATENTS, ROPE, GRID, TEXT, TURNS, *NUMBERS))


def leaves():
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(7, 16, generator=g), torch.randn(7, 16, generator=g).to(BF16)]
    made += [torch.randn(*shape, generator=g) for shape in ((2, 16),) * 3 + ((16,), (3, 8, 16), (3, 16, 8), (9, 16))]
    return [x.to(DEVICE).requires_grad_() for x in made]


def run(function):
    given = leaves()
    results = function(tables(), *given)
    loss = sum(result.float().sin().sum() for result in results if result.requires_grad)
    return [*results, *torch.autograd.grad(loss, given)]


@functools.cache
def plain(served_by):
    return run(block)


def compiled(*args):
    torch.compiler.reset()
    return torch.compile(block, fullgraph=True, backend="aot_eager")(*args)


def in_autocast(*args):
    with torch.autocast(DEVICE, dtype=BF16):
        return block(*args)


def checkpointed(*args):
    return checkpoint(block, *args, use_reentrant=False)


@pytest.mark.parametrize("served_by", SERVED_BY)
@pytest.mark.parametrize("function", [compiled, checkpointed, in_autocast], ids=lambda f: f.__name__)
def test_same_bits_as_a_plain_call(function, served_by, monkeypatch):
    monkeypatch.setenv("UVG_BACKENDS", served_by)  # without the reference: what they refuse is an error
    for a, b in zip(run(function), plain(served_by), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)

"""The triton backend inside torch.compile, activation checkpointing and autocast gives the bits of a plain call."""

import functools
import os

import pytest
import torch
from harness import BF16, spans
from torch.utils.checkpoint import checkpoint

from uvg_engine import backends, ops

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton runs kernels without a GPU only where TRITON_INTERPRET=1", allow_module_level=True)

SPANS = spans((0, 3), (3, 4))
SAMPLES = SPANS[:, None]
ROPE = spans((0, 3, 1, 0, 0, 0), (3, 4, 0, 1, 2, 2))
GRID, TEXT = spans((3, 1, 2, 2)), spans((0, 3))
TURNS = torch.randn(2, 4, 4, 2, generator=torch.Generator().manual_seed(1))
TARGET, NAMES, HALF = torch.arange(7), torch.arange(2), torch.full((2,), 0.5)
LATENTS, COEFS = (spans((0, 48), (48, 64)), SPANS), torch.ones(2, 10)


def block(h, y, gate, shift, scale, weight, w1, w2, head):
    """Every op."""
    h = ops.gated_residual(h, y, gate, SPANS)
    h, normed = ops.gated_residual_norm(h, y, gate, SPANS, shift, scale, SPANS)
    normed = ops.modulated_layer_norm(normed, shift, scale, SPANS)
    q, k = (x.view(7, 2, 8) for x in ops.qk_norm_rope(normed, normed, weight, weight, ROPE, TURNS, 2))
    seen = ops.flash_attention(q, k, k, SAMPLES, SAMPLES)[0].flatten(1)
    near = ops.window_attention(q, k, k, GRID, TEXT, tile=(1, 1, 2), radius=(0, 1, 0))[0].flatten(1)
    weights, experts = ops.moe_route(normed[:, :3], 2)
    rows, offsets, order = ops.moe_dispatch(seen + near, experts, 3)
    rows = ops.moe_mlp(rows, w1, w1[:, :, 0].contiguous(), w2, w2[:, :, 0].contiguous(), offsets)
    mixed = ops.moe_combine(rows, order, weights)
    bias, names = head[:, 0].contiguous(), (TARGET, TARGET + 1, TARGET + 2)
    ids = ops.linear_sample(mixed, head, bias, *names)
    rows, coefs = h.flatten().detach(), COEFS + gate[:, :10].detach()
    data, half = (rows, ids, HALF, HALF, NAMES), 0.5 * rows
    x, velocity, noisy = ops.flow_noise(*data, 3, *LATENTS, 9)
    stepped = ops.flow_step(
        x, velocity, half, HALF, coefs, half, half, half, LATENTS[0], noisy, ids, HALF, NAMES, NAMES, LATENTS[1]
    )
    return h, mixed, ops.linear_cross_entropy(mixed, head, bias, TARGET), ids, *stepped


def leaves():
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(7, 16, generator=g), torch.randn(7, 16, generator=g).to(BF16)]
    made += [torch.randn(*shape, generator=g) for shape in ((2, 16),) * 3 + ((16,), (3, 8, 16), (3, 16, 8), (9, 16))]
    return [x.requires_grad_() for x in made]


def run(function):
    given = leaves()
    results = function(*given)
    loss = sum(result.float().sin().sum() for result in results if result.requires_grad)
    return [*results, *torch.autograd.grad(loss, given)]


@functools.cache
def plain():
    with backends.force("triton"):
        return run(block)


def compiled(*args):
    torch.compiler.reset()
    return torch.compile(block, fullgraph=True, backend="aot_eager")(*args)


def in_autocast(*args):
    with torch.autocast("cpu", dtype=BF16):
        return block(*args)


def checkpointed(*args):
    return checkpoint(block, *args, use_reentrant=False)


@pytest.mark.parametrize("function", [compiled, checkpointed, in_autocast], ids=lambda f: f.__name__)
def test_same_bits_as_a_plain_call(function):
    with backends.force("triton"):
        got = run(function)
    for a, b in zip(got, plain(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)

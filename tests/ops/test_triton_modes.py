"""The triton backend inside torch.compile, activation checkpointing and autocast gives the bits of a plain call."""

import os

import pytest
import torch
from harness import BF16, spans
from torch.utils.checkpoint import checkpoint

from uvg_engine import backends, ops

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton runs kernels without a GPU only where TRITON_INTERPRET=1", allow_module_level=True)

SPANS = spans((0, 3), (3, 4))


def block(h, y, gate, shift, scale):
    h = ops.gated_residual(h, y, gate, SPANS)
    return h, ops.modulated_layer_norm(h, shift, scale, SPANS)


def leaves():
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(7, 16, generator=g), torch.randn(7, 16, generator=g).to(BF16)]
    made += [torch.randn(2, 16, generator=g) for _ in range(3)]
    return [x.requires_grad_() for x in made]


def run(function):
    given = leaves()
    h, normed = function(*given)
    loss = h.float().square().sum() + normed.float().sin().sum()
    return [h, normed, *torch.autograd.grad(loss, given)]


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
        got, want = run(function), run(block)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)

"""kernels/_philox.py draws the words of reference.philox, bit for bit."""

import pytest
import torch

from uvg_engine.backends.triton import interpreting
from uvg_engine.reference import philox

if not interpreting() and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from uvg_engine.kernels import _philox

DEVICE = "cpu" if interpreting() else "cuda"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SIZE = 64
BIG = 2**31 - 1


@triton.jit
def draws_kernel(p_seeds, p_tokens, p_words, p_uniform, p_integers, step, tile, high, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    w0, w1, w2, w3 = _philox.words(tl.load(p_seeds + at), step, _philox.DRAW, tl.load(p_tokens + at), tile)
    tl.store(p_words + at, w0.to(tl.int64))
    tl.store(p_words + SIZE + at, w1.to(tl.int64))
    tl.store(p_words + 2 * SIZE + at, w2.to(tl.int64))
    tl.store(p_words + 3 * SIZE + at, w3.to(tl.int64))
    tl.store(p_uniform + at, _philox.uniform(w0))
    tl.store(p_integers + at, _philox.integers(w1, high))


@pytest.mark.parametrize("step, tile, high", [(0, 0, 1), (7, 3, 256000), (BIG, BIG, BIG), (-1, 2**32 + 5, 1000)])
def test_draws(step, tile, high):
    g = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (SIZE,), generator=g)
    tokens = torch.randint(0, 2**32, (SIZE,), generator=g)
    seeds[:3], tokens[:3] = torch.tensor([0, -1, 2**63 - 1]), torch.tensor([0, 1, 2**32 - 1])
    got_words = torch.empty(4, SIZE, dtype=torch.int64, device=DEVICE)
    got_uniform, got_integers = torch.empty(SIZE, device=DEVICE), torch.empty_like(got_words[0])
    given = seeds.to(DEVICE), tokens.to(DEVICE)
    draws_kernel[(1,)](*given, got_words, got_uniform, got_integers, step, tile, high, SIZE=SIZE)
    got_words, got_uniform, got_integers = (x.cpu() for x in (got_words, got_uniform, got_integers))
    want = philox.words(seeds, step, philox.DRAW, tokens, tile)
    assert torch.equal(got_words, torch.stack(want))
    assert torch.equal(got_uniform, philox.uniform(want[0]))
    assert torch.equal(got_integers, philox.integers(want[1], high))


def test_streams_have_the_numbers_of_the_reference():
    for name in ("NOISE", "SOURCE", "COIN", "DRAW"):
        assert getattr(_philox, name).value == getattr(philox, name)

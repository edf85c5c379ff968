"""Draws of reference.philox inside kernels, bit for bit. A draw is named by (seed; step, stream, token, tile)."""

from __future__ import annotations

import triton
import triton.language as tl

# The second counter word, one for each use: the values of reference.philox.
NOISE: tl.constexpr = tl.constexpr(0)
SOURCE: tl.constexpr = tl.constexpr(1)
COIN: tl.constexpr = tl.constexpr(2)
DRAW: tl.constexpr = tl.constexpr(3)


@triton.jit
def words(seed, step, stream, token, tile):
    """The four uint32 words of a draw. seed: int64; the others: integers, of which the low 32 bits count.

    All broadcast together; at least one must be a block.
    """
    block = (seed + step + stream + token + tile).to(tl.int64) * 0  # philox wants counters of one shape
    c0 = (block + step).to(tl.uint32)
    c1 = (block + stream).to(tl.uint32)
    c2 = (block + token).to(tl.uint32)
    c3 = (block + tile).to(tl.uint32)
    return tl.philox(block + seed, c0, c1, c2, c3)


@triton.jit
def uniform(word):
    """A word as a uniform in (0, 1), exact in fp32: (2 * (word >> 9) + 1) * 2^-24."""
    return ((word >> 9) * 2 + 1).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def integers(word, high):
    """A word as an int64 in [0, high): (word * high) >> 32."""
    return (word.to(tl.int64) * high) >> 32

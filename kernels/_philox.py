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


@triton.jit
def _log_uniform(word):
    """ln of `uniform(word)` to fp32 accuracy, near 1 too: an exponent and a series in (m - 1) / (m + 1)."""
    odd = ((word >> 9) * 2 + 1).to(tl.float32)  # u * 2^24, exact
    bits = odd.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 151  # 127 + 24
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    high = m > 1.41421356
    m = tl.where(high, 0.5 * m, m)
    exponent = tl.where(high, exponent + 1, exponent).to(tl.float32)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    return exponent * 0.6931471805599453 + 2.0 * s * (1.0 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9)))))


@triton.jit
def _turn(word):
    """(cos, sin) of 2 pi `uniform(word)` to fp32 accuracy: exact reduction to an eighth of a turn, then Taylor."""
    odd = ((word >> 9) * 2 + 1).to(tl.int32)  # u * 2^24
    quarter = (odd + (1 << 21)) >> 22
    t = (odd - (quarter << 22)).to(tl.float32) * 3.745070282923929e-07  # 2 pi 2^-24
    z = t * t
    sine = t * (1.0 + z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880)))))
    cosine = 1.0 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800)))))
    odd_quarter = (quarter & 1) == 1
    x, y = tl.where(odd_quarter, sine, cosine), tl.where(odd_quarter, cosine, sine)
    x = tl.where(((quarter + 1) & 2) == 2, -x, x)
    y = tl.where((quarter & 2) == 2, -y, y)
    return x, y


@triton.jit
def normals(w0, w1, w2, w3):
    """Four standard normals of one draw by Box-Muller, in fp32."""
    r_a, r_b = tl.sqrt(-2.0 * _log_uniform(w0)), tl.sqrt(-2.0 * _log_uniform(w2))
    cos_a, sin_a = _turn(w1)
    cos_b, sin_b = _turn(w3)
    return r_a * cos_a, r_a * sin_a, r_b * cos_b, r_b * sin_b

"""Philox4x32-10 on tensors: randomness as data, the same words on every backend.

A draw is named by (seed; step, stream, token, tile) and nothing else: not by batch, order or device.
Everything here is integer arithmetic but the two maps at the end, whose formulas are fixed:

    uniform   u = (2*(w >> 9) + 1) * 2^-24     23 bits; odd multiples of 2^-24, so exact in fp32 and never 0 or 1
              (24 bits plus a half would not fit fp32's 24-bit significand: w = 2^32-1 would round to 1)
    integer   (w * V) >> 32 in 64 bits         V < 2^31; bias below V * 2^-32
    normals   r = sqrt(-2 ln u(w0)), a = 2 pi u(w1): (r cos a, r sin a); the same of (w2, w3)   |n| <= 5.77

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11); Box and Muller 1958.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Words = tuple[Tensor, Tensor, Tensor, Tensor]

# Streams: the second counter word, one per use, so that no two uses ever share a draw.
NOISE, SOURCE, COIN, DRAW, DATA, TIME = range(6)

ROUNDS = 10
MASK32 = 0xFFFFFFFF
_MUL_A, _MUL_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85


def _mulhilo(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant a times x (values below 2^32 in int64 lanes), with no int64 overflow."""
    low, high = x * (a & 0xFFFF), x * (a >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & MASK32


def philox4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> Words:
    """Ten Philox rounds on counter (c0..c3) under key (k0, k1).

    All int64 tensors (broadcast together), only the low 32 bits count. Returns 4 int64 tensors in [0, 2^32).
    """
    c0, c1, c2, c3, k0, k1 = (t & MASK32 for t in (c0, c1, c2, c3, k0, k1))
    for _ in range(ROUNDS):
        hi_a, lo_a = _mulhilo(_MUL_A, c0)
        hi_b, lo_b = _mulhilo(_MUL_B, c2)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + _WEYL_A) & MASK32, (k1 + _WEYL_B) & MASK32
    return c0, c1, c2, c3


def seed_key(seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Key words of request seeds: (low 32 bits, high 32 bits). seeds: int64 tensor, any sign."""
    return seeds & MASK32, (seeds >> 32) & MASK32


def words(
    seeds: Tensor, step: int | Tensor, stream: int | Tensor, token: int | Tensor, tile: int | Tensor = 0
) -> Words:
    """The four uint32 words of draw (step, stream, token, tile) under each seed.

    seeds: int64 tensor. step, stream, token, tile: int or int64 tensors; all broadcast together.
    Returns 4 int64 tensors of the broadcast shape, values in [0, 2^32).
    """
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be an int64 tensor, got {getattr(seeds, 'dtype', seeds)}")
    counter = [torch.as_tensor(c, dtype=torch.int64, device=seeds.device) for c in (step, stream, token, tile)]
    seeds, c0, c1, c2, c3 = torch.broadcast_tensors(seeds, *counter)
    return philox4x32(c0, c1, c2, c3, *seed_key(seeds))


def uniform(word: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A word as a uniform in (0, 1): (2*(w >> 9) + 1) * 2^-24, exact in fp32 and fp64."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")
    return (2 * (word >> 9) + 1).to(dtype) * 2.0**-24


def integers(word: Tensor, high: int) -> Tensor:
    """A word as an integer in [0, high): (w * high) >> 32. high: int in [1, 2^31)."""
    if not 1 <= high < 2**31:
        raise ValueError(f"high must be in [1, 2^31), got {high}")
    return (word * high) >> 32


def normals(w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Four standard normals of one draw by Box-Muller; returns [..., 4] in dtype.

    Evaluated in fp64 and rounded once: the reference owes nobody an ulp, and its bits cannot depend on
    which elements shared a vector register. Other backends repeat it to fp32 accuracy.
    """
    u = [uniform(w, torch.float64) for w in (w0, w1, w2, w3)]
    r_a, r_b = (-2 * u[0].log()).sqrt(), (-2 * u[2].log()).sqrt()
    angle_a, angle_b = 2 * math.pi * u[1], 2 * math.pi * u[3]
    n = (r_a * angle_a.cos(), r_a * angle_a.sin(), r_b * angle_b.cos(), r_b * angle_b.sin())
    return torch.stack(n, dim=-1).to(dtype)

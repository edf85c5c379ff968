"""One categorical draw per row from a linear head, tile by tile. Letters: L rows, D width, V vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uvg_engine.reference.philox import DRAW, uniform, words
from uvg_engine.reference.spans import accumulation_dtype

TILE = 1024  # columns per tile; part of the result, so the same on every backend


def forward(
    x_LD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    seeds_L: Tensor,
    steps_L: Tensor,
    tokens_L: Tensor,
    temperature: float,
) -> Tensor:
    """Returns ids int64 [L]; -1 for a row without a distribution (a NaN or +inf logit, or none above -inf).

    Logits in fp32 or better, the draw in fp64. Row by row on purpose: a GEMM's bits, and those of a vectorised exp, may
    depend on how many rows it is given, and a draw must not depend on its neighbours.
    """
    dtype = accumulation_dtype(x_LD.dtype)
    rows = [row.to(dtype, copy=True) for row in x_LD]  # own buffers: library kernels may look at the alignment
    draws = [_Greedy() if temperature == 0 else _Draw(temperature) for _ in rows]
    for tile, start in enumerate(range(0, len(weight_VD), TILE)):
        weight, bias = weight_VD[start : start + TILE].to(dtype), bias_V[start : start + TILE].to(dtype)
        lanes = words(seeds_L, steps_L, DRAW, tokens_L, tile)[:2]
        inside, between = (uniform(word, torch.float64).tolist() for word in lanes)
        for row, draw, u_inside, u_between in zip(rows, draws, inside, between, strict=True):
            draw.add(torch.addmv(bias, weight, row), start, u_inside, u_between)
    return torch.tensor([draw.choice for draw in draws], dtype=torch.int64, device=x_LD.device)


class _Greedy:
    """The running argmax; ties go to the lowest index."""

    def __init__(self) -> None:
        self.choice, self.best = -1, -math.inf

    def add(self, logits: Tensor, start: int, u_inside: float, u_between: float) -> None:
        index = int(logits.argmax())
        value = float(logits[index])
        if not math.isnan(self.best) and not value <= self.best:  # a NaN is taken, and stays
            self.best = value
            self.choice = start + index if abs(value) < math.inf else -1


class _Draw:
    """The running choice, with the mass seen so far as mass * exp(peak / temperature)."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.choice, self.mass, self.peak = -1, 0.0, -math.inf

    def add(self, logits: Tensor, start: int, u_inside: float, u_between: float) -> None:
        peak = float(logits.max())
        if peak == -math.inf or math.isnan(self.mass):
            return
        cumulative = ((logits.double() - peak) / self.temperature).exp().cumsum(0)  # dividing first might overflow
        tile_mass = float(cumulative[-1])
        if math.isnan(tile_mass):
            self.choice, self.mass = -1, math.nan
            return
        top = max(self.peak, peak)
        self.mass *= math.exp((self.peak - top) / self.temperature)
        tile_share = tile_mass * math.exp((peak - top) / self.temperature)
        self.mass, self.peak = self.mass + tile_share, top
        if u_between * self.mass < tile_share:
            self.choice = start + int(torch.searchsorted(cumulative, u_inside * tile_mass, right=True))

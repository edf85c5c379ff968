"""When each stream is where: video noise levels, text times, and how kappa decides whether a token jumps.

t runs from 0 (source) to 1 (data); sigma = 1 - t; the model's own time input is 1000 * sigma.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MODEL_TIMES = 1000.0
MOST_STEPS = 100_000  # a plan is made whole, before the work starts
JUMP_RULES = ("euler", "exact", "progress")
"""When a token may change: the Euler step of its rate, the exact transition, or the published joint rule."""

RATE_FLOOR = 1e-6  # 1 - kappa is taken no smaller, so that the rate stays finite at t = 1


@dataclass(frozen=True)
class SigmaSchedule:
    """Noise levels of N steps: linspace(1, end, N+1) without its last, shifted, then 0.

    steps: N, from 1 to MOST_STEPS. shift: s in s*sigma / (1 + (s-1)*sigma); 1 leaves them even. Quirks of diffusers'
    UniPC scheduler, off by default: end=1e-3 (where the linspace ends) and below_one=1e-6 (taken off a first sigma of
    1: its logarithms need that, ours do not). Source: Wan2.1 and the published Uni-ViGU code; diffusers.
    """

    steps: int
    shift: float = 1.0
    end: float = 0.0
    below_one: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {self.steps!r}")
        if self.steps > MOST_STEPS:
            raise ValueError(f"steps must be at most {MOST_STEPS}, got {self.steps}")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift must be finite and positive, got {self.shift}")
        for name, value in (("end", self.end), ("below_one", self.below_one)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")

    def sigmas(self) -> tuple[float, ...]:
        """The N+1 levels, falling from 1 to 0; fp32 numbers, as the published schedulers hold them.

        Raises ValueError where two of them are the same such number.
        """
        even = [1 + (self.end - 1) * i / self.steps for i in range(self.steps)]
        out = [self.shift * s / (self.shift * s + (1 - s)) for s in even]
        if abs(out[0] - 1) < 1e-6:
            out[0] -= self.below_one
        levels = (*torch.tensor(out, dtype=torch.float64).float().tolist(), 0.0)
        if any(a <= b for a, b in itertools.pairwise(levels)):
            raise ValueError(f"steps and shift must leave the noise levels apart, got {self.steps} and {self.shift}")
        return levels


@dataclass(frozen=True)
class Kappa:
    """kappa_t = t^power: the share of data tokens on the mixture path. power >= 1; 1 is linear.

    Source: Gat et al., "Discrete flow matching", 2024.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.power) and self.power >= 1):
            raise ValueError(f"power must be finite and at least 1, got {self.power}")

    def __call__(self, t: Tensor) -> Tensor:
        """kappa at t, any shape, values in [0, 1]."""
        return t**self.power

    def rate(self, t: Tensor) -> Tensor:
        """kappa' / (1 - kappa) at t, the jump rate of a token; finite at t = 1 (RATE_FLOOR)."""
        left = -torch.expm1(self.power * torch.log(t))  # 1 - t^n without cancellation
        return self.power * t ** (self.power - 1) / left.clamp_min(RATE_FLOOR)

    def jump_probability(self, t: float, t_next: float, rule: str = "euler") -> float:
        """How likely a token jumps to its drawn data token while time goes from t to t_next.

        rule "euler": 1 - exp(-(t_next - t) * rate(t)), the published step. "exact": the share of those still at the
        source whom the path itself moves, (kappa' - kappa) / (1 - kappa): as cheap, and its error over N steps falls
        like 1/N, not log(N)/N. Both are 1 where t_next is 1.
        """
        if not 0 <= t < t_next <= 1:
            raise ValueError(f"t and t_next must be 0 <= t < t_next <= 1, got {t} and {t_next}")
        if rule not in ("euler", "exact"):
            raise ValueError(f"rule must be euler or exact, got {rule!r}")
        if t_next == 1:
            return 1.0
        now = torch.tensor([t, t_next], dtype=torch.float64)
        if rule == "euler":
            return -math.expm1(-(t_next - t) * float(self.rate(now)[0]))
        here, there = self(now).tolist()
        return (there - here) / (1 - here)


def progress_probability(index: int, steps: int) -> float:
    """The published joint rule: at step i of N a token is replaced with probability i / (N-1); a lone step replaces."""
    if not 0 <= index < steps:
        raise ValueError(f"index must be in [0, {steps}), got {index}")
    return index / (steps - 1) if steps > 1 else 1.0


def model_time(sigma: float, round_bf16: bool = False, integer: bool = False) -> float:
    """1000 * sigma, the model's time input.

    Quirks, off by default: round_bf16 (the published code), integer (diffusers' schedulers cut it to an integer).
    """
    time = MODEL_TIMES * sigma
    if integer:
        time = float(int(time))
    return float(torch.tensor(time, dtype=torch.float64).to(torch.bfloat16)) if round_bf16 else time

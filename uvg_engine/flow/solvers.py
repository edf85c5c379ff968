"""Video solvers as rows of ten numbers: what `flow_step` multiplies its tensors by at each step.

v is the velocity, m = x + c0*v the data estimate of this step, m1 and m2 those of the two before, last the corrected
state of the step before:

    xc = c1*x + c2*last + c3*m + c4*m1 + c5*m2          x' = c6*xc + c7*m + c8*m1 + c9*v

All arithmetic here is Python's fp64, once per job; sigma = 1 and sigma = 0 are served by their limits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

Row = tuple[float, ...]
SOLVERS = ("euler", "unipc")
"""The video solvers: Euler, and UniPC of order 2."""

HOLD: Row = (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
"""The row under which a latent stays, whatever its velocity is."""


def solver_rows(solver: str, sigmas: Sequence[float]) -> tuple[Row, ...]:
    """One row per step from the N+1 falling noise levels. solver: "euler" or "unipc" (order 2, bh2, predict x0)."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    levels = list(sigmas)
    falling = all(a > b for a, b in itertools.pairwise(levels))
    if len(levels) < 2 or not falling or levels[0] > 1 or levels[-1] < 0:
        raise ValueError(f"sigmas must be two or more, fall strictly and lie in [0, 1], got {levels}")
    return euler_rows(levels) if solver == "euler" else unipc_rows(levels)


def euler_rows(sigmas: Sequence[float]) -> tuple[Row, ...]:
    """x' = x + (sigma' - sigma)*v; m is the data estimate, for whoever looks at it."""
    return tuple(
        (-now, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, after - now) for now, after in itertools.pairwise(sigmas)
    )


def unipc_rows(sigmas: Sequence[float], lower_order_final: bool = True) -> tuple[Row, ...]:
    """UniPC of order 2 with B(h) = e^h - 1 on data predictions, first step (and by default the last) of order 1.

    Source: Zhao et al., "UniPC", 2023; agrees with diffusers' UniPCMultistepScheduler in flow prediction.
    """
    steps = len(sigmas) - 1
    if not lower_order_final and sigmas[-1] == 0 and steps > 1:
        raise ValueError("lower_order_final must be True where the last sigma is 0, got False")
    rows, order = [], 0
    for i in range(steps):
        corrector = _corrector(sigmas, i, order) if i else (1.0, 0.0, 0.0, 0.0, 0.0)
        order = min(2, i + 1, steps - i if lower_order_final else 2)
        rows.append((-sigmas[i], *corrector, *_predictor(sigmas, i, order), 0.0))
    return tuple(rows)


def _predictor(sigmas: Sequence[float], i: int, order: int) -> tuple[float, float, float]:
    """Weights of (xc, m, m1) in the state at sigma[i+1]."""
    now, after = sigmas[i], sigmas[i + 1]
    grow, alpha = math.expm1(-_h(now, after)), 1 - after
    previous = 0.5 * alpha * grow * _inverse_ratio(sigmas, i) if order == 2 else 0.0
    return after / now, -alpha * grow + previous, -previous


def _corrector(sigmas: Sequence[float], i: int, order: int) -> tuple[float, float, float, float, float]:
    """Weights of (x, last, m, m1, m2) in the corrected state at sigma[i], reached from sigma[i-1] with `order`."""
    before, now = sigmas[i - 1], sigmas[i]
    hh, alpha = -_h(before, now), 1 - now
    grow = math.expm1(hh)
    older, newest = 0.0, 0.5
    if order == 2:
        phi_1 = grow / hh - 1
        phi_2 = phi_1 / hh - 0.5
        b_1, b_2 = phi_1 / grow, 2 * phi_2 / grow
        # rho_1 + rho_2 = b_1 and r*rho_1 + rho_2 = b_2, with q = 1/r so that r = inf (sigma 1 two steps back) is served
        q = _inverse_ratio(sigmas, i - 1)
        rho_1 = (b_2 - b_1) * q / (1 - q)
        older, newest = rho_1 * q, b_1 - rho_1
    scale = alpha * grow
    return 0.0, now / before, -scale * newest, -scale + scale * (older + newest), -scale * older


def _inverse_ratio(sigmas: Sequence[float], i: int) -> float:
    """1/r of the point before step i: h of step i over the log-SNR from there back to sigma[i-1]; negative."""
    back = _log_snr(sigmas[i - 1]) - _log_snr(sigmas[i])
    return _h(sigmas[i], sigmas[i + 1]) / back


def _h(now: float, after: float) -> float:
    return _log_snr(after) - _log_snr(now)


def _log_snr(sigma: float) -> float:
    """log((1 - sigma) / sigma): -inf at 1, inf at 0."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0 else -math.inf
    return math.log1p(-sigma) - math.log(sigma)

"""Exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch

from uvg_engine.model.univigu import UniViGU


class Ema:
    """Averages a model's parameters; decay warms up as (1 + n) / (10 + n), so that early steps do not linger."""

    def __init__(self, model: UniViGU, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: UniViGU) -> None:
        """Take one step towards `model`."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages: list[torch.Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(averages, [p.detach() for p in model.parameters()], weight)

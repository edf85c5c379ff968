"""Optimisers of training: AdamW, and Muon for the matrices of the blocks beside it.

Letters: S matrices of one shape, M rows, N columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_STEPS = 5
_QUINTIC = (3.4445, -4.7750, 2.0315)  # X <- a X + (b A + c A^2) X with A = X X^T
_RMS = 0.2  # of an update, about that of AdamW: both take the same learning rate and weight decay


def make_optimizer(
    model: nn.Module, name: str, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser `name` (config.OPTIMIZERS). Vectors do not decay; `muon` is for matrices of blocks."""
    hidden, matrices, vectors = [], [], []
    for key, parameter in model.named_parameters():
        if name == "muon" and is_hidden_matrix(key, parameter):
            hidden.append(parameter)
        elif parameter.ndim >= 2:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if name == "muon":
        groups.append({"params": hidden, "weight_decay": weight_decay, "orthogonal": True})
        return Muon(groups, lr, betas)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def is_hidden_matrix(key: str, parameter: Tensor) -> bool:
    """Whether a parameter maps features to features inside a block: weights of its projections and of its experts."""
    return key.startswith("blocks.") and parameter.ndim >= 2 and not key.endswith(("scale_shift_table", ".b1", ".b2"))


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan 2024) with the update's size matched to AdamW's (J. Liu et al. 2025); AdamW for the other groups.

    Groups with `orthogonal` hold matrices, or stacks of them in the leading axes. torch.optim.Muon takes no stacks,
    which the experts are, and goes matrix by matrix; here all of one shape go at once.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "orthogonal": False})
        plain = [{**group} for group in self.param_groups if not group["orthogonal"]]
        self._adamw = torch.optim.AdamW(plain, lr=lr, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update with each group's `lr`. closure: computes the gradients first; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plain = iter(self._adamw.param_groups)
        for group in self.param_groups:
            if group["orthogonal"]:
                self._step_orthogonal(group)
            else:
                next(plain)["lr"] = group["lr"]
        self._adamw.step()
        return loss

    def _step_orthogonal(self, group: dict[str, Any]) -> None:
        shapes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                shapes.setdefault(tuple(parameter.shape[-2:]), []).append((parameter, parameter.grad))
        for shape, pairs in shapes.items():
            directions = []
            for parameter, grad in pairs:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(grad, 1 - _MOMENTUM)
                directions.append(grad.lerp(state["momentum"], _MOMENTUM).reshape(-1, *shape))
            updates = orthogonalize(torch.cat(directions)) * (_RMS * max(shape) ** 0.5)
            for (parameter, _), update in zip(pairs, updates.split([len(d) for d in directions]), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"])

    def state_dict(self) -> dict[str, Any]:
        """`muon` and `adamw`: the states of both."""
        return {"muon": super().state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        super().load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])


def orthogonalize(x_SMN: Tensor) -> Tensor:
    """Matrices with the same singular vectors and singular values near 1 (0.7 to 1.2), fp32 [S, M, N].

    Newton-Schulz iteration in bf16. A matrix of zeros stays one.
    """
    tall = x_SMN.shape[-2] > x_SMN.shape[-1]
    x = (x_SMN.mT if tall else x_SMN).bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = _QUINTIC
    for _ in range(_STEPS):
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return (x.mT if tall else x).float()

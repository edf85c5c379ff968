from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends.cuda._tensors import floats_like, launch, refuses_tensors


def refuses(logits: Tensor, *rest: object) -> str | None:
    return refuses_tensors(logits)


def _sizes(logits: Tensor, top_k: int) -> dict[str, int | torch.dtype]:
    return {"rows": logits.shape[0], "experts": logits.shape[1], "top_k": top_k, "dtype": logits.dtype}


def forward(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.moe_route.forward."""
    logits, weights = logits.contiguous(), floats_like(logits, len(logits), top_k)
    chosen = torch.empty_like(weights, dtype=torch.int32)
    launch("moe_route_forward", logits, logits=logits, **_sizes(logits, top_k), weights=weights, chosen=chosen)
    return weights, chosen


def backward(dweights: Tensor, weights: Tensor, experts: Tensor, logits: Tensor, top_k: int) -> Tensor:
    """Arguments and results as in reference.moe_route.backward."""
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    given = {"weights": weights.contiguous(), "chosen": experts.contiguous(), "dweights": dweights.contiguous()}
    launch("moe_route_backward", logits, **given, **_sizes(logits, top_k), dlogits=dlogits)
    return dlogits

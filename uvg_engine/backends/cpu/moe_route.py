from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, at, new_floats, packed, refuses_tensors


def refuses(logits: Tensor, *rest) -> str | None:
    return refuses_tensors(logits)


def forward(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.moe_route.forward."""
    logits, weights = packed(logits), new_floats(len(logits), top_k)
    chosen = torch.empty_like(weights, dtype=torch.int32)
    sizes = (*logits.shape, top_k, DTYPES[logits.dtype], torch.get_num_threads())
    native.core().moe_route(False, at(logits), *sizes, at(weights), at(chosen), 0, 0)
    return weights, chosen


def backward(dweights: Tensor, weights: Tensor, experts: Tensor, logits: Tensor, top_k: int) -> Tensor:
    """Arguments and results as in reference.moe_route.backward."""
    dweights, weights, experts = packed(dweights), packed(weights), packed(experts)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    sizes = (*logits.shape, top_k, DTYPES[logits.dtype], torch.get_num_threads())
    native.core().moe_route(True, 0, *sizes, at(weights), at(experts), at(dweights), at(dlogits))
    return dlogits

"""Top-k routing by a softmax over experts. Letters: T rows, E experts, K experts per row."""

from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.reference.spans import accumulation_dtype


def forward(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Returns (weights [T, K] in fp32 or better, experts int32 [T, K]), the most probable expert first."""
    logits = logits_TE.to(accumulation_dtype(logits_TE.dtype))
    chosen, experts = (part[:, :top_k] for part in logits.sort(dim=-1, descending=True, stable=True))
    return chosen.softmax(-1), experts.int()  # the softmax over E, renormalised over K, is the softmax over K


def backward(dweights_TK: Tensor, weights_TK: Tensor, experts_TK: Tensor, logits_TE: Tensor, top_k: int) -> Tensor:
    """Returns dlogits [T, E]; experts that were not chosen get zero."""
    dweights = dweights_TK.to(weights_TK.dtype)
    dchosen = weights_TK * (dweights - (dweights * weights_TK).sum(-1, keepdim=True))
    return torch.zeros_like(logits_TE).scatter_(1, experts_TK.long(), dchosen.to(logits_TE.dtype))

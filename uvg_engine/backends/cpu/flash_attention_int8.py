from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu.flash_attention import inputs, refuses

__all__ = ["forward", "refuses"]


def forward(q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float) -> Tensor:
    """Arguments and results as in reference.flash_attention_int8.forward."""
    q, k, v, q_spans, k_spans = (x.contiguous() for x in (q, k, v, q_spans, k_spans))
    out = torch.empty_like(q)
    native.core().flash_attention_int8(*inputs(q, k, v, q_spans, k_spans, scale), out.data_ptr())
    return out

"""Attention with scores from bytes. Letters: T query rows, U key rows, N heads, H head width, B samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.ops._plans import planned
from uvg_engine.ops._registry import define, no_gradient
from uvg_engine.ops.flash_attention import check_spans, require_attention
from uvg_engine.ops.linear_int8 import refuse_gradient, require_depth


@planned
def flash_attention_int8(
    q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, *, scale: float | None = None
) -> Tensor:
    """`flash_attention` with q and k rounded to bytes, -127 to 127 by the largest value of each row and head. Before
    that the keys lose their mean over the sample, which adds the same to all scores of a query and so changes no
    weight. Probabilities and values as in `flash_attention`.

    Arguments as there. Returns out [T, N, H] in q's dtype; no lse. A sample's bits do not depend on the others. No
    gradient: an argument that requires one is refused while gradients are on. Source: SageAttention (arXiv 2410.02367).
    Raises ValueError as `flash_attention` does.
    """
    require_attention(q, k, v, q_spans, k_spans)
    require_depth(q.shape[-1])
    refuse_gradient("flash_attention_int8", q=q, k=k, v=v)
    return _fwd(q, k, v, q_spans, k_spans, q.shape[-1] ** -0.5 if scale is None else float(scale))


def _fake(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(q)


_ARGS = "Tensor q, Tensor k, Tensor v, Tensor q_spans, Tensor k_spans, float scale"
_fwd = define("flash_attention_int8", f"({_ARGS}) -> Tensor", _fake, check_spans)
no_gradient("flash_attention_int8")

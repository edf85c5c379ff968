"""Attention of each sample over its own spans. Letters: T query rows, U key rows, N heads, H head width, B samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.ops._plans import planned, unseen
from uvg_engine.ops._registry import (
    another_form,
    autograd,
    define,
    define_backward,
    kernel_of,
    require,
    require_apart,
    require_floating,
    require_inside,
    require_shape,
    require_spans,
)
from uvg_engine.reference.spans import accumulation_dtype


@planned
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v, bidirectional, per sample over the union of its key spans.

    q: [T, N, H]; k, v: [U, N, H], the same floating dtype. q_spans: int32 [B, Mq, 2]; k_spans: int32 [B, Mk, 2] of
    (start, len); the rows in any of sample b's q spans see the keys in all of sample b's k spans; len 0 marks an
    unused entry. A row belongs to one sample at the most. scale: 1/sqrt(H) unless given. Returns (out [T, N, H] in
    q's dtype, lse [N, T] fp32, natural log, not differentiable). A row without keys, or in no span, gives 0 and -inf.
    Softmax in fp32. Source: FlashAttention (arXiv 2205.14135).
    Raises ValueError on a shape or dtype it does not serve, on a span beyond the rows, and, of tables on the CPU, on
    q spans that overlap.
    """
    require_attention(q, k, v, q_spans, k_spans)
    return _fwd(q, k, v, q_spans, k_spans, q.shape[-1] ** -0.5 if scale is None else float(scale))


def require_attention(q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor) -> None:
    """Shapes and dtypes are those of `flash_attention`."""
    require_floating("q", q, "T, N, H")
    require(0 not in q.shape[1:], "q must have N > 0 heads of width H > 0", tuple(q.shape))
    for name, x in (("k", k), ("v", v)):
        require_shape(name, x, (k.shape[0], *q.shape[1:]), q.dtype)
    for name, spans in (("q_spans", q_spans), ("k_spans", k_spans)):
        require_spans(name, spans, dims=3)
    samples = q_spans.shape[0], k_spans.shape[0]
    require(samples[0] == samples[1], "q_spans and k_spans must have the same B", samples)


def check_spans(q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float) -> None:
    """Spans lie inside the rows, and those of q do not overlap. Reads values: for the `check` of `define`."""
    require_apart("q_spans", q_spans, q.shape[0])
    require_inside("k_spans", k_spans, k.shape[0])


def _fake(q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=accumulation_dtype(q.dtype))


def _fake_bwd(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_ARGS = "Tensor q, Tensor k, Tensor v, Tensor q_spans, Tensor k_spans, float scale"
_fwd = define("flash_attention", f"({_ARGS}) -> (Tensor, Tensor)", _fake, check_spans)
_bwd = define_backward(
    "flash_attention",
    f"(Tensor dout, Tensor out, Tensor lse, {_ARGS}) -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
    num_saved=3,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, dout: Tensor, dlse: Any) -> tuple[Any, ...]:
    return *_bwd(dout, *ctx.saved_tensors, ctx.scale), None, None, None


autograd("flash_attention", _backward, _setup)


def rows_of(*samples: Tensor) -> tuple[Tensor, ...]:
    """[B, L, N, H] as [B * L, N, H]."""
    return tuple([x.squeeze(0) if x.shape[0] == 1 else x.flatten(0, 1) for x in samples])


def _dense(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out, lse = kernel_of("uvg::flash_attention")(*rows_of(q, k, v), *rest)
    return torch.ops.aten._unsafe_view(out, q.shape), lse  # autograd lets nobody write to a view made here


@unseen
def _dense_bwd(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    grads = _bwd(*rows_of(dout, out), lse, *rows_of(q, k, v), *rest)
    return tuple([grad.view(x.shape) for grad, x in zip(grads, (q, k, v), strict=True)])


def _dense_backward(ctx: Any, dout: Tensor, dlse: Any) -> tuple[Any, ...]:
    return *_dense_bwd(dout, *ctx.saved_tensors, ctx.scale), None, None, None


# q: [B, L, N, H]; k, v: [B, S, N, H]; the rest as of `_fwd`. Returns (out [B, L, N, H], lse [N, B * L]).
dense_with_gradient = another_form("flash_attention", _dense, _dense_backward, _setup)

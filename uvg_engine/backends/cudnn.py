"""The cudnn backend: cuDNN's attention as torch calls it, for one sample."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from uvg_engine.backends import Kernel, samples
from uvg_engine.backends.samples import Packed

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def refuses(q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, *rest: object) -> str | None:
    """One sample, whose spans are taken together; heads up to 128 wide."""
    if (reason := samples.refuses(q, 128)) is not None:
        return reason
    if len(q_spans) != 1:
        return f"{len(q_spans)} samples; cuDNN gets one, others would be calls of their own"
    return None if torch.backends.cudnn.is_available() else f"torch {torch.__version__} has no cuDNN"


def _dense(x: Tensor) -> Tensor:
    return x[None].transpose(1, 2)  # [T, N, H] -> [1, N, T, H]


def _rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2)[0].contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _forward(_dense(q), _dense(k), _dense(v), None, True, scale=scale)
    return _rows(out), lse.reshape(q.shape[1], len(q))


def _attend_back(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Packed,
    keys: Packed,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout: seed and offset
    dense = [_dense(x) for x in (dout, q, k, v, out)]
    statistics = lse.contiguous()[None, ..., None]
    sizes = None, None, None, len(q), len(k)  # no mask, no bounds: one sample
    grads = _backward(*dense, statistics, unused, unused, *sizes, 0.0, False, scale=scale)
    dq, dk, dv = (_rows(grad) for grad in grads)
    return dq, dk, dv


TABLE = {
    "flash_attention": Kernel(
        functools.partial(samples.forward, _attend), functools.partial(samples.backward, _attend_back), refuses
    )
}

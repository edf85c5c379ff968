"""The cudnn backend: cuDNN's attention as torch calls it, a call for each sample.

Samples of equal lengths are not batched: a sample's bits may not depend on the others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from uvg_engine.backends import Kernel, samples
from uvg_engine.backends.samples import Packed

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def refuses(q: Tensor, *rest: object) -> str | None:
    """Heads up to 128 wide."""
    if (reason := samples.refuses(q, 128)) is not None:
        return reason
    return None if torch.backends.cudnn.is_available() else f"torch {torch.__version__} has no cuDNN"


def _dense(x: Tensor) -> Tensor:
    return x[None].transpose(1, 2)  # [T, N, H] -> [1, N, T, H]


def _rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2)[0].contiguous()


def _parts(packed: Packed, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of each sample, of each tensor."""
    return zip(*(x.split(packed.lengths) for x in tensors), strict=True)


def _attend(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed, scale: float) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for (q_one,), (k_one, v_one) in zip(_parts(queries, q), _parts(keys, k, v), strict=True):
        out, lse, *_ = _forward(_dense(q_one), _dense(k_one), _dense(v_one), None, True, scale=scale)
        outs.append(_rows(out))
        lses.append(lse.reshape(q.shape[1], len(q_one)))
    return torch.cat(outs), torch.cat(lses, 1)


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
    grads = []
    for (dout_one, out_one, q_one, lse_one), (k_one, v_one) in zip(
        _parts(queries, dout, out, q, lse.T), _parts(keys, k, v), strict=True
    ):
        dense = [_dense(x) for x in (dout_one, q_one, k_one, v_one, out_one)]
        statistics = lse_one.T.contiguous()[None, ..., None]
        sizes = None, None, None, len(q_one), len(k_one)  # no mask, no bounds: one sample
        found = _backward(*dense, statistics, unused, unused, *sizes, 0.0, False, scale=scale)
        grads.append([_rows(grad) for grad in found])
    dq, dk, dv = (torch.cat(parts) for parts in zip(*grads, strict=True))
    return dq, dk, dv


TABLE = {
    "flash_attention": Kernel(
        functools.partial(samples.forward, _attend), functools.partial(samples.backward, _attend_back), refuses
    )
}

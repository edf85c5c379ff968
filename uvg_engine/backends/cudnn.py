"""The cudnn backend: cuDNN's attention as torch calls it, a call for each sample, without a backward.

Samples of equal lengths are not batched: a sample's bits may not depend on the others. torch asks cuDNN for a backward
whose sums have no fixed order ("cuDNN SDPA is not deterministic", it says): another backend goes on from the lse.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from uvg_engine.backends import Kernel, samples
from uvg_engine.backends.samples import Packed

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention


def refuses(q: Tensor, *rest: object) -> str | None:
    """Heads up to 128 wide."""
    if (reason := samples.refuses(q, 128)) is not None:
        return reason
    return None if torch.backends.cudnn.is_available() else f"torch {torch.__version__} has no cuDNN"


def _dense(x: Tensor) -> Tensor:
    return x[None].transpose(1, 2)  # [T, N, H] -> [1, N, T, H]


def _rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2)[0].contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed, scale: float) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for (_, q_one), (_, k_one, v_one) in zip(queries.each(q), keys.each(k, v), strict=True):
        out, lse = _sample(q_one, k_one, v_one, scale)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)


def _sample(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out [L, N, H], lse [N, L]) of one sample. cuDNN has no plan for a single query or key: torch's own attention
    keeps them from it ("does not support sequence length 1"), and so must who calls it directly."""
    if len(k) == 1:
        score = scale * (q.float() * k.float()).sum(-1)
        weight = (score - score).exp()[..., None]  # one, or NaN of what is not finite
        return (weight * v).to(v.dtype), score.T
    if len(q) == 1:
        out, lse = _sample(q.repeat(2, 1, 1), k, v, scale)
        return out[:1], lse[:, :1]
    out, lse, *_ = _forward(_dense(q), _dense(k), _dense(v), None, True, scale=scale)
    return _rows(out), lse.reshape(q.shape[1], len(q))


TABLE = {"flash_attention": Kernel(functools.partial(samples.forward, _attend), refuses=refuses)}

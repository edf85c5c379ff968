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
        out, lse, *_ = _forward(_dense(q_one), _dense(k_one), _dense(v_one), None, True, scale=scale)
        outs.append(_rows(out))
        lses.append(lse.reshape(q.shape[1], len(q_one)))
    return torch.cat(outs), torch.cat(lses, 1)


TABLE = {"flash_attention": Kernel(functools.partial(samples.forward, _attend), refuses=refuses)}

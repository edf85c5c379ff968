"""Softmax attention over spans, scores from bytes. Letters: T query rows, U key rows, N heads, H head width."""

from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.reference.linear_int8 import signed
from uvg_engine.reference.spans import accumulation_dtype, rows_of


def forward(q_TNH: Tensor, k_UNH: Tensor, v_UNH: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float) -> Tensor:
    """Returns out [T, N, H] in q's dtype; rows of no span give 0. Keys lose their mean over the sample, in fp32."""
    dtype = accumulation_dtype(q_TNH.dtype)
    out = torch.zeros_like(q_TNH)
    for sample_q, sample_k in zip(q_spans, k_spans, strict=True):
        rows, keys = rows_of(sample_q), rows_of(sample_k)
        if not len(rows) or not len(keys):
            continue
        k = k_UNH[keys].float()
        (q, q_scale), (k, k_scale) = _rows(q_TNH[rows]), _rows(k - k.double().mean(0).float())
        scores = torch.einsum("qnh,knh->nqk", q, k).to(dtype) * q_scale.mT.to(dtype)[..., None] * scale
        weights = (scores * k_scale.mT.to(dtype)[:, None]).softmax(-1)
        out[rows] = torch.einsum("nqk,knh->qnh", weights, v_UNH[keys].to(dtype)).to(out.dtype)
    return out


def _rows(x_TNH: Tensor) -> tuple[Tensor, Tensor]:
    """`signed` of every row and head: whole numbers in fp64, in which sums are exact, and scales [T, N]."""
    values, scale = signed(x_TNH.flatten(0, 1))
    return values.view(x_TNH.shape).double(), scale.view(x_TNH.shape[:2])

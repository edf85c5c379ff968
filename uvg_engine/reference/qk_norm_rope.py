"""RMS norm of q and k over the full width, then rotary positions. Letters: T rows, D width, N heads, H head width.

kind 0 (video): 3-D positions, interleaved pairs; kind 1 (text): 1-D position, rotate-half. Column j of the table serves
pair j of a head; for video the axis of pair j is given by `axis_of_pair`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.reference.spans import accumulation_dtype

VIDEO, TEXT = 0, 1


def axis_of_pair(head_dim: int) -> Tensor:
    """Axis (0 frame, 1 y, 2 x) of each of the H/2 pairs: widths H - 4*(H//6), 2*(H//6), 2*(H//6) of a head."""
    side = head_dim // 6
    return torch.tensor([0] * (head_dim // 2 - 2 * side) + [1] * side + [2] * side)


def angles(rope_spans: Tensor, rope_table: Tensor, num_rows: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin [T, H/2] in the table's dtype and is_text [T] for every row of the spans."""
    pairs = head_dim // 2
    cos = rope_table.new_ones(num_rows, pairs)
    sin = rope_table.new_zeros(num_rows, pairs)
    is_text = torch.zeros(num_rows, dtype=torch.bool, device=rope_table.device)
    axis, columns = axis_of_pair(head_dim), torch.arange(pairs)
    for start, length, kind, _, height, width in rope_spans.tolist():
        if not length:
            continue
        index = torch.arange(length)
        if kind == VIDEO:
            coordinates = torch.stack([index // (height * width), index // width % height, index % width])
            position = coordinates[axis].T
        else:
            position = index[:, None].expand(length, pairs)
        rows = slice(start, start + length)
        cos[rows] = rope_table[kind, position, columns, 0]
        sin[rows] = rope_table[kind, position, columns, 1]
        is_text[rows] = kind == TEXT
    return cos, sin, is_text


def _rotate(x_TNH: Tensor, cos: Tensor, sin: Tensor, is_text: Tensor) -> Tensor:
    half = x_TNH.shape[-1] // 2
    cos, sin = cos[:, None].to(x_TNH.dtype), sin[:, None].to(x_TNH.dtype)
    even, odd = x_TNH[..., 0::2], x_TNH[..., 1::2]
    video = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    low, high = x_TNH[..., :half], x_TNH[..., half:]
    text = torch.cat([low * cos - high * sin, low * sin + high * cos], -1)
    return torch.where(is_text[:, None, None], text, video)


def forward(
    q_TD: Tensor,
    k_TD: Tensor,
    weight_q_D: Tensor,
    weight_k_D: Tensor,
    rope_spans: Tensor,
    rope_table: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (q [T, D], k [T, D], rstd_q [T], rstd_k [T])."""
    rope = angles(rope_spans, rope_table, len(q_TD), q_TD.shape[1] // num_heads)
    outs, stats = [], []
    for x_TD, weight_D in ((q_TD, weight_q_D), (k_TD, weight_k_D)):
        x = x_TD.to(accumulation_dtype(x_TD.dtype))
        rstd = torch.rsqrt(x.square().mean(-1) + eps)
        normed = x * rstd[:, None] * weight_D.to(x.dtype)
        rotated = _rotate(normed.unflatten(-1, (num_heads, -1)), *rope).flatten(-2)
        outs.append(rotated.to(x_TD.dtype))
        stats.append(rstd)
    return outs[0], outs[1], stats[0], stats[1]


def backward(
    dq_TD: Tensor,
    dk_TD: Tensor,
    rstd_q_T: Tensor,
    rstd_k_T: Tensor,
    q_TD: Tensor,
    k_TD: Tensor,
    weight_q_D: Tensor,
    weight_k_D: Tensor,
    rope_spans: Tensor,
    rope_table: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (dq, dk, dweight_q, dweight_k)."""
    cos, sin, is_text = angles(rope_spans, rope_table, len(q_TD), q_TD.shape[1] // num_heads)
    dxs, dweights = [], []
    for dy_TD, rstd_T, x_TD, weight_D in ((dq_TD, rstd_q_T, q_TD, weight_q_D), (dk_TD, rstd_k_T, k_TD, weight_k_D)):
        dtype = rstd_T.dtype
        dy_TNH = dy_TD.to(dtype).unflatten(-1, (num_heads, -1))
        dnormed = _rotate(dy_TNH, cos, -sin, is_text).flatten(-2)  # the inverse of a rotation is its transpose
        xhat = x_TD.to(dtype) * rstd_T[:, None]
        dweights.append((dnormed * xhat).sum(0).to(weight_D.dtype))
        dxhat = dnormed * weight_D.to(dtype)
        dx = rstd_T[:, None] * (dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True))
        dxs.append(dx.to(x_TD.dtype))
    return dxs[0], dxs[1], dweights[0], dweights[1]

"""flash-attn 2's calls, on every device and dtype that `ops.flash_attention` serves, forward and backward.

    from uvg_engine.compat.flash_attn import flash_attn_func

An argument that changes the result and is not served is refused by its name. Letters: B samples, L queries, S keys,
N heads, M heads of keys and values (N is a multiple of it), H head width, T packed queries, U packed keys.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from uvg_engine.backends import plans
from uvg_engine.backends.devices import capturing
from uvg_engine.ops import flash_attention
from uvg_engine.ops._alone import alone, has_values
from uvg_engine.ops._plans import planned
from uvg_engine.ops.flash_attention import dense_with_gradient, require_attention, rows_of

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

Result = Tensor | tuple[Tensor, Tensor, Tensor]


@planned
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Bidirectional attention of a dense batch. q: [B, L, N, H]; k, v: [B, S, M, H], the same floating dtype.

    softmax_scale: 1/sqrt(H) unless given. deterministic: always is, on the CPU. Returns out [B, L, N, H]; with
    return_attn_probs also lse (fp32 [B, N, L]) and an empty tensor, as flash-attn does without dropout. Raises
    ValueError on dropout, causal, window, softcap, alibi_slopes, and on shapes that do not fit.
    """
    _refuse(dropout_p, causal, window_size, softcap, alibi_slopes)
    shape_q, shape_k = q.shape, k.shape
    if not len(shape_q) == len(shape_k) == 4 or shape_k[0] != shape_q[0] or v.shape != shape_k:
        for name, x in (("q", q), ("k", k), ("v", v)):
            _require(x.ndim == 4, f"{name} must be (B, L, N, H)", tuple(x.shape))
            _require(x.shape[0] == q.shape[0], f"{name} must have q's B = {q.shape[0]}", tuple(x.shape))
        _require(v.shape == k.shape, f"v must have k's shape {tuple(k.shape)}", tuple(v.shape))
    samples, queries, heads, _ = shape_q
    group = _group(q, heads, shape_k[2])
    q_spans = _even_spans(samples, queries * group, q)
    k_spans = q_spans if shape_k[1] == queries * group else _even_spans(samples, shape_k[1], q)
    if group == 1 and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)) and alone((q, k, v)):
        q_rows, k_rows, v_rows = rows_of(q, k, v)
        require_attention(q_rows, k_rows, v_rows, q_spans, k_spans)
        scale = shape_q[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
        out, lse = dense_with_gradient(q, k, v, q_spans, k_spans, scale)
    else:
        q, k, v = rows_of(q, k, v)
        out, lse = _attend(q, k, v, q_spans, k_spans, softmax_scale, group)
        out = out.view(shape_q)
    if return_attn_probs:
        return out, lse.view(heads, samples, queries).transpose(0, 1).contiguous(), out.new_empty(0)
    return out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Bidirectional attention of samples that lie one after the other. q: [T, N, H]; k, v: [U, M, H].

    cu_seqlens_q, cu_seqlens_k: int32 [B + 1], where each sample starts, and the end. max_seqlen_q, max_seqlen_k: the
    longest sample; our kernels do not need them. Returns out [T, N, H], with return_attn_probs also lse (fp32 [N, T])
    and an empty tensor. A sample without keys gives 0 and -inf, and so do rows past the end. Raises ValueError as
    `flash_attn_func`, on block_table, and, of tensors on the CPU, on bounds that do not begin with 0,
    that fall, or that end beyond the rows.
    """
    _refuse(dropout_p, causal, window_size, softcap, alibi_slopes)
    _require(block_table is None, "block_table must be None: paged keys are not served", block_table)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require(x.ndim == 3, f"{name} must be (T, N, H)", tuple(x.shape))
    _require(v.shape == k.shape, f"v must have k's shape {tuple(k.shape)}", tuple(v.shape))
    for name, x, rows in (("cu_seqlens_q", cu_seqlens_q, len(q)), ("cu_seqlens_k", cu_seqlens_k, len(k))):
        ok = x.ndim == 1 and x.dtype == torch.int32 and len(x) == len(cu_seqlens_q) >= 1
        _require(ok, f"{name} must be an int32 (B + 1), the same B for both", f"{x.dtype} {tuple(x.shape)}")
        if has_values(x):  # on a device the host would have to wait for the values
            bounds = x.tolist()
            rising = bounds[0] == 0 and all(a <= b for a, b in itertools.pairwise((*bounds, rows)))
            _require(rising, f"{name} must begin with 0, not fall, and end within the {rows} rows", bounds)
    group, q_spans = _group(q, q.shape[1], k.shape[1]), _spans(cu_seqlens_q)
    k_spans = q_spans if cu_seqlens_k is cu_seqlens_q else _spans(cu_seqlens_k)
    out, lse = _attend(q, k, v, q_spans * group if group > 1 else q_spans, k_spans, softmax_scale, group)
    return (out, lse.contiguous(), out.new_empty(0)) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]. qkv: [B, L, 3, N, H]."""
    _require(qkv.ndim == 5 and qkv.shape[2] == 3, "qkv must be (B, L, 3, N, H)", tuple(qkv.shape))
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q, kv[:, :, 0] and kv[:, :, 1]. q: [B, L, N, H]; kv: [B, S, 2, M, H]."""
    _require(kv.ndim == 5 and kv.shape[2] == 2, "kv must be (B, S, 2, M, H)", tuple(kv.shape))
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of qkv[:, 0], qkv[:, 1], qkv[:, 2]. qkv: [T, 3, N, H]."""
    _require(qkv.ndim == 4 and qkv.shape[1] == 3, "qkv must be (T, 3, N, H)", tuple(qkv.shape))
    q, k, v = qkv.unbind(1)
    rest = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *rest)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of q, kv[:, 0] and kv[:, 1]. q: [T, N, H]; kv: [U, 2, M, H]."""
    _require(kv.ndim == 4 and kv.shape[1] == 2, "kv must be (U, 2, M, H)", tuple(kv.shape))
    k, v = kv.unbind(1)
    rest = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *rest)


def _group(q: Tensor, heads: int, key_heads: int) -> int:
    """How many heads of q become rows of one, as they share keys. On a GPU 1: not timed there."""
    if heads == key_heads:
        return 1
    _require(
        0 not in (heads, key_heads) and heads % key_heads == 0,
        f"heads of q must be a multiple of k's {key_heads}",
        heads,
    )
    return heads // key_heads if q.is_cpu else 1


def _attend(
    q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float | None, group: int
) -> tuple[Tensor, Tensor]:
    """Attention of packed rows, `group` rows of q_spans for each of q."""
    if group == 1:
        if q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return flash_attention(q, k, v, q_spans, k_spans, scale=scale)
    rows, heads, width = q.shape
    grouped = q.reshape(rows, heads // group, group, width).transpose(1, 2).reshape(rows * group, heads // group, width)
    out, lse = flash_attention(grouped, k, v, q_spans, k_spans, scale=scale)
    out = out.view(rows, group, heads // group, width).transpose(1, 2).reshape(rows, heads, width)
    return out, lse.view(heads // group, rows, group).transpose(1, 2).reshape(heads, rows)


def _even_spans(samples: int, length: int, like: Tensor) -> Tensor:
    if not alone(()) or capturing(like.device):
        return _new_even_spans(samples, length, like.device)
    return plans.constant(_kept_even_spans(samples, length, like.device))


def _new_even_spans(samples: int, length: int, device: torch.device) -> Tensor:
    start = torch.arange(samples, dtype=torch.int32, device=device) * length
    return torch.stack([start, torch.full_like(start, length)], 1)[:, None]


@functools.lru_cache(maxsize=256)
def _kept_even_spans(samples: int, length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # may be saved for a backward
        return _new_even_spans(samples, length, torch.device("cpu")).to(device)  # waits: other streams may be next


def _spans(bounds: Tensor) -> Tensor:
    return torch.stack([bounds[:-1], bounds.diff()], 1)[:, None]


def _refuse(dropout_p: float, causal: bool, window_size: Any, softcap: float, alibi_slopes: Tensor | None) -> None:
    window = tuple(window_size) if isinstance(window_size, list) else window_size
    given, served = (dropout_p, causal, window, softcap), (0.0, False, (-1, -1), 0.0)
    if given == served and alibi_slopes is None:
        return
    for name, value, want in zip(("dropout_p", "causal", "window_size", "softcap"), given, served, strict=True):
        _require(value == want, f"{name} must be {want}: others are not served", value)
    _require(False, "alibi_slopes must be None: others are not served", alibi_slopes)


def _require(condition: bool, rule: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{rule}, got {value!r}")

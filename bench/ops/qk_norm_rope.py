from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.case import Case, Peer, Size, joined, leaf, normal
from bench.gpu_peers import liger_rms_norm_peer
from uvg_engine import ops
from uvg_engine.model.embeddings import inverse_frequencies, rope_table


def make(size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    q, k = (normal(dtype, size.rows, size.width, scale=s) for s in (1.0, 0.9))
    weights = (torch.ones(size.width, dtype=dtype).requires_grad_() for _ in range(2))
    head = size.width // size.heads
    table = rope_table(head, max(*size.grid, size.text), inverse_frequencies(head))
    return q, k, *weights, size.layout.rope_spans, table, size.heads


def angles(size: Size, table: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of every video token [Lv, H/2, 2] and every text token [Lt, H/2, 2], from the op's table."""
    head = size.width // size.heads
    side = head // 6
    places = torch.cartesian_prod(*(torch.arange(n) for n in size.grid))
    axes = torch.arange(3).repeat_interleave(torch.tensor([head // 2 - 2 * side, side, side]))
    video = table[0][places[:, axes], torch.arange(head // 2)]
    return video, table[1][: size.text]


def turned(x: Tensor, table: Tensor, pairs: bool) -> Tensor:
    """x [B, L, N, H] rotated by table [L, H/2, 2] (cos, sin): neighbours together, or the halves of a head."""
    cos, sin = table[:, None].unbind(-1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1) if pairs else x.float().chunk(2, -1)
    both = a * cos - b * sin, a * sin + b * cos
    return (torch.stack(both, -1).flatten(-2) if pairs else torch.cat(both, -1)).type_as(x)


def torch_peer(size: Size, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, *rest: Any) -> Peer:
    """torch's rms_norm and the rotations written out, samples dense."""
    video, text = angles(size, rest[1])

    def rotated(x: Tensor, weight: Tensor, table: Tensor, pairs: bool) -> Tensor:
        normed = functional.rms_norm(x, x.shape[-1:], weight, 1e-6).unflatten(-1, (size.heads, -1))
        return turned(normed, table, pairs).flatten(-2)

    def both(*inputs: Tensor) -> tuple[Tensor, ...]:
        q_video, q_text, k_video, k_text, weight_q, weight_k, video, text = inputs
        return (
            *(rotated(q_video, weight_q, video, True), rotated(q_text, weight_q, text, False)),
            *(rotated(k_video, weight_k, video, True), rotated(k_text, weight_k, text, False)),
        )

    inputs = [leaf(part) for x in (q, k) for part in size.by_modality(x)]
    return Peer(both, (*inputs, leaf(weight_q), leaf(weight_k), video, text), lambda outs: joined(outs[:2]))


def diffusers_peer(size: Size, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, *rest: Any) -> Peer:
    """torch's rms_norm, then diffusers' apply_rotary_emb: interleaved pairs for video, halves for text."""
    from diffusers.models.embeddings import apply_rotary_emb

    video, text = angles(size, rest[1])
    rotations = (
        ([video[..., i].repeat_interleave(2, dim=-1) for i in (0, 1)], -1),
        ([text[..., i].repeat(1, 2) for i in (0, 1)], -2),
    )

    def rotate(x: Tensor, weight: Tensor, kind: int) -> Tensor:
        (cos, sin), unbind = rotations[kind]
        normed = functional.rms_norm(x, x.shape[-1:], weight, 1e-6).unflatten(-1, (size.heads, -1))
        return apply_rotary_emb(normed, (cos, sin), use_real_unbind_dim=unbind, sequence_dim=1).flatten(-2)

    def both(*inputs: Tensor) -> tuple[Tensor, ...]:
        *tokens, weight_q, weight_k = inputs
        return tuple(rotate(x, (weight_q, weight_k)[i // 2], i % 2) for i, x in enumerate(tokens))

    inputs = [leaf(part) for x in (q, k) for part in size.by_modality(x)]
    return Peer(both, (*inputs, leaf(weight_q), leaf(weight_k)), lambda outs: joined(outs[:2]))


def norm_alone(q: Tensor, weight: Tensor) -> Tensor:
    return ops.qk_norm_rope(q, None, weight, None)[0]


def make_alone(size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return normal(dtype, size.rows, size.width), torch.ones(size.width, dtype=dtype).requires_grad_()


def torch_alone(size: Size, q: Tensor, weight: Tensor) -> Peer:
    return Peer(lambda q, weight: functional.rms_norm(q, q.shape[-1:], weight, 1e-6), (leaf(q), leaf(weight)))


CASES = (
    Case(
        ops.qk_norm_rope,
        shape=lambda size: f"T={size.rows} D={size.width} N={size.heads}",
        make=make,
        work=lambda size, item: (14 * size.rows * size.width, 4 * item * size.rows * size.width),
        peers={"torch": torch_peer, "diffusers": diffusers_peer},
    ),
    Case(
        norm_alone,
        shape=lambda size: f"T={size.rows} D={size.width}",
        make=make_alone,
        work=lambda size, item: (4 * size.rows * size.width, 2 * item * size.rows * size.width),
        peers={"torch": torch_alone, "liger.norm": liger_rms_norm_peer},
        name="q alone, no rotation",
    ),
)

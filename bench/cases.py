"""What is timed: one call per op at the sizes of a small video model. Letters as in uvg_engine.ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uvg_engine import ops

WIDTH, HEADS, HIDDEN, VOCAB = 256, 4, 1024, 8192
VIDEO, TEXT = 960, 64  # rows of one sample


@dataclass(frozen=True)
class Case:
    """One timed call. shape: for people. call: takes what `make(dtype)` returns."""

    op: str
    shape: str
    make: Callable[[torch.dtype], tuple[Any, ...]]
    call: Callable[..., Any]


def _normal(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])) * scale).to(dtype)


def _spans(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int32)


ROWS = VIDEO + TEXT
ROW_SPANS = _spans((0, VIDEO), (VIDEO, TEXT))
MODULATION = (_normal(torch.float32, 2, WIDTH), _normal(torch.float32, 2, WIDTH))


def _norm(dtype: torch.dtype) -> tuple[Any, ...]:
    return _normal(dtype, ROWS, WIDTH), *MODULATION, ROW_SPANS


def _residual(dtype: torch.dtype) -> tuple[Any, ...]:
    return _normal(torch.float32, ROWS, WIDTH), _normal(dtype, ROWS, WIDTH), MODULATION[0], ROW_SPANS


def _attention(dtype: torch.dtype) -> tuple[Any, ...]:
    qkv = (_normal(dtype, ROWS, HEADS, WIDTH // HEADS) for _ in range(3))
    return *qkv, ROW_SPANS[None], ROW_SPANS[None]


def _experts(dtype: torch.dtype) -> tuple[Any, ...]:
    w1, w2 = _normal(dtype, 2, HIDDEN, WIDTH, scale=0.05), _normal(dtype, 2, WIDTH, HIDDEN, scale=0.05)
    biases = torch.zeros(2, HIDDEN, dtype=dtype), torch.zeros(2, WIDTH, dtype=dtype)
    offsets = torch.tensor([0, VIDEO, ROWS], dtype=torch.int32)
    return _normal(dtype, ROWS, WIDTH), w1, biases[0], w2, biases[1], offsets


def _head(dtype: torch.dtype) -> tuple[Any, ...]:
    bias = torch.zeros(VOCAB, dtype=dtype)
    return _normal(dtype, TEXT, WIDTH), _normal(dtype, VOCAB, WIDTH, scale=0.05), bias


def _draw(dtype: torch.dtype) -> tuple[Any, ...]:
    return *_head(dtype), *(torch.arange(TEXT) for _ in range(3))


def _target(dtype: torch.dtype) -> tuple[Any, ...]:
    return *_head(dtype), torch.arange(TEXT)


ATTENTION = f"T={ROWS} N={HEADS} H={WIDTH // HEADS}"
CASES = (
    Case("modulated_layer_norm", f"T={ROWS} D={WIDTH} S=2", _norm, ops.modulated_layer_norm),
    Case("gated_residual", f"T={ROWS} D={WIDTH} S=2", _residual, ops.gated_residual),
    Case("flash_attention", ATTENTION, _attention, ops.flash_attention),
    Case("moe_mlp", f"T={ROWS} D={WIDTH} F={HIDDEN} E=2", _experts, ops.moe_mlp),
    Case("linear_sample", f"L={TEXT} D={WIDTH} V={VOCAB}", _draw, ops.linear_sample),
    Case("linear_cross_entropy", f"L={TEXT} D={WIDTH} V={VOCAB}", _target, ops.linear_cross_entropy),
)

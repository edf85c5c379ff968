"""Token losses of a linear head. Letters: L rows, D width, V words, P panels of BLOCK_N words, C words of a step.

Forward: `_head` gives each panel's mass and the logits that the loss asks for; one kernel makes the losses of them.
Backward: for some thousand words at a time the gradient of the logits is computed again, once, into a buffer that the
next words take over, and two products follow from it. The sums have one order, whatever the size of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uvg_engine.kernels._configs import ANY, Table, options
from uvg_engine.kernels._head import LOGITS, as_matrix, by_pieces, masses, uses_descriptors
from uvg_engine.kernels._launch import SM80, AotCase, blocks, launch, packed
from uvg_engine.kernels.linear_cross_entropy_kernels import (
    linear_cross_entropy_bwd_logits_kernel,
    linear_cross_entropy_bwd_rows_kernel,
    linear_cross_entropy_bwd_words_kernel,
    linear_cross_entropy_fwd_kernel,
)

STEP_ELEMENTS = 1 << 25  # of the gradient of the logits, held at once; untuned
_STEP_WORDS = 1024  # whole blocks of every configuration: a step is a multiple, at least one


@dataclass(frozen=True)
class LossConfig:
    """ROWS of a program, PANELS of a row at a time."""

    ROWS: int
    PANELS: int
    num_warps: int


@dataclass(frozen=True)
class ProductConfig:
    """A program's BLOCK_M by BLOCK_N of a gradient, BLOCK_K summed at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


LOSS = Table("linear_cross_entropy.LOSS", {(SM80, ANY): LossConfig(4, 128, 4)})
# (oldest capability, bytes of a number, bytes of a gradient of a logit, see `_held_as`, and `by_pieces`): fp32 by the
# FMA units, fp16 as TF32. With two stages, TF32 spilled 8 bytes on sm_100.
PRODUCT = Table(
    "linear_cross_entropy.PRODUCT",
    {
        (SM80, 4, 4, True): ProductConfig(64, 64, 16, 8, 2),
        (SM80, 2, 4, False): ProductConfig(128, 64, 32, 8, 3, maxnreg=255),
        (SM80, 2, 4, True): ProductConfig(128, 128, 32, 8, 3, maxnreg=255),
        (SM80, 2, 2, False): ProductConfig(128, 64, 32, 8, 3),
        (SM80, 2, 2, True): ProductConfig(128, 128, 64, 8, 3),
    },
)


def _held_as(dtype: torch.dtype) -> torch.dtype:
    """dtype of the gradient of the logits. For fp16 it is fp32: a probability of 1e-6 times a loss's 1e-4 is no fp16
    number. TF32 products then round it to 11 digits, and take x and the weight, which have no more, as they are."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def step_words(num_rows: int, vocab: int) -> int:
    """Words of a step of the backward."""
    most = blocks(vocab, _STEP_WORDS) * _STEP_WORDS
    return min(most, max(1, STEP_ELEMENTS // (_STEP_WORDS * max(num_rows, 1))) * _STEP_WORDS)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, current: Tensor | None, rate: Tensor | None, loss: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.linear_cross_entropy.forward."""
    x, weight, bias, target, current, rate = map(packed, (x, weight, bias, target, current, rate))
    tops, sums, at_target, at_current = masses(x, weight, bias, target, current, 1.0)
    losses, lse = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    p_current = torch.empty_like(at_current)
    config = LOSS.on(x.device, len(x))
    launch(
        *(linear_cross_entropy_fwd_kernel, (blocks(len(x), config.ROWS),), tops, sums, at_target, at_current),
        *(target, current, rate, losses, lse, p_current, *tops.shape),
        **options(config),
    )
    return losses, lse, p_current


def backward(
    dloss: Tensor,
    lse: Tensor,
    p_current: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    current: Tensor | None,
    rate: Tensor | None,
    loss: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.linear_cross_entropy.backward."""
    x, weight, bias, target, current, rate = map(packed, (x, weight, bias, target, current, rate))
    dloss, lse, p_current = map(packed, (dloss, lse, p_current))
    num_rows, width, vocab = *x.shape, len(weight)
    held = _held_as(x.dtype)
    tma, pieces = uses_descriptors(x, weight), by_pieces(x, weight)
    head = LOGITS.on(x.device, x.itemsize, pieces)
    product = PRODUCT.on(x.device, x.itemsize, held.itemsize, pieces)
    step, tiles = step_words(num_rows, vocab), blocks(num_rows, head.BLOCK_M)
    dlogits = x.new_empty(num_rows, step, dtype=held)
    sums = x.new_empty(tiles, step, dtype=torch.float32)
    dx_sums = x.new_empty(num_rows, width, dtype=torch.float32)
    dx, dweight, dbias = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, weight, bias))
    head_matrices = as_matrix(x, tma, head.BLOCK_M, head.BLOCK_K), as_matrix(weight, tma, head.BLOCK_N, head.BLOCK_K)
    by_rows = (
        as_matrix(dlogits, tma, product.BLOCK_M, product.BLOCK_K),
        as_matrix(weight, tma, product.BLOCK_K, product.BLOCK_N),
    )
    by_words = (
        as_matrix(dlogits, tma, product.BLOCK_K, product.BLOCK_M),
        as_matrix(x, tma, product.BLOCK_K, product.BLOCK_N),
    )
    precision = "tf32" if x.dtype == torch.float16 else "ieee"
    for first in range(0, vocab, step):
        words = min(step, vocab - first)
        launch(
            *(linear_cross_entropy_bwd_logits_kernel, (tiles * blocks(words, head.BLOCK_N),), *head_matrices),
            *(bias, dloss, lse, p_current, target, current, rate, dlogits, sums, num_rows, width, vocab, first, step),
            TMA=tma,
            **options(head),
        )
        launch(
            *(linear_cross_entropy_bwd_rows_kernel,),
            (blocks(num_rows, product.BLOCK_M) * blocks(width, product.BLOCK_N),),
            *(*by_rows, dx_sums, dx, num_rows, width, vocab, first, words, step),
            FIRST=first == 0,
            LAST=first + words == vocab,
            PRECISION=precision,
            TMA=tma,
            **options(product),
        )
        launch(
            *(linear_cross_entropy_bwd_words_kernel,),
            (blocks(words, product.BLOCK_M) * blocks(width, product.BLOCK_N),),
            *(*by_words, sums, dweight, dbias, num_rows, width, vocab, first, step, tiles),
            PRECISION=precision,
            TMA=tma,
            **options(product),
        )
    return dx, dweight, dbias


def _aot_call(rows: int, width: int, vocab: int, dtype: torch.dtype, loss: str) -> None:
    x, weight, bias = (
        torch.empty(*shape, dtype=dtype, device="meta") for shape in ((rows, width), (vocab, width), (vocab,))
    )
    words, numbers = (torch.empty(rows, dtype=kind, device="meta") for kind in (torch.int64, torch.float32))
    more = (words, numbers, loss) if loss == "gkl" else (None, None, loss)
    losses, lse, p_current = forward(x, weight, bias, words, *more)
    backward(losses, lse, p_current, x, weight, bias, words, *more)


def _aot_case(
    shape: tuple[int, int, int], dtype: torch.dtype, loss: str, shows: tuple[str, ...], **changes: Any
) -> AotCase:
    rows, width, vocab = shape
    step = min(vocab, step_words(rows, vocab))
    flops = {"head_masses_kernel": 2.0 * rows * width * vocab}
    products = ("bwd_logits", "bwd_rows", "bwd_words")
    flops |= {f"linear_cross_entropy_{name}_kernel": 2.0 * rows * width * step for name in products}
    expects = {**dict.fromkeys(flops, shows), "linear_cross_entropy_fwd_kernel": ()}
    label = f"{loss} L={rows} D={width} V={vocab} {str(dtype)[6:]}"
    return AotCase(label, lambda: _aot_call(*shape, dtype, loss), expects, flops, **changes)


_SHAPE = (512, 1536, 256300)  # four steps
_ODD = (16386, 77, 5131)  # six steps; rows at any address
AOT_CASES = (
    _aot_case(_SHAPE, torch.bfloat16, "gkl", ("dot", "tma")),
    _aot_case(_SHAPE, torch.bfloat16, "ce", ("dot", "tma")),
    _aot_case(_SHAPE, torch.float16, "gkl", ("dot",)),
    _aot_case((28, 128, 160), torch.float32, "gkl", ()),
    _aot_case(_ODD, torch.bfloat16, "ce", ("dot",)),
    _aot_case(_ODD, torch.float16, "gkl", ("dot",)),
)

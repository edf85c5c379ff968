"""Logits of a vocabulary head that never leave the chip: what linear_sample and linear_cross_entropy share.

Letters: L rows, D width, V words, P panels: runs of BLOCK_N words, of which 1024 words hold a whole number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from uvg_engine.kernels._configs import Table, options
from uvg_engine.kernels._launch import COUNTS, SM80, SM90, blocks, capability_of, launch
from uvg_engine.kernels.moe_mlp_gemm import load_tile


@dataclass(frozen=True)
class HeadConfig:
    """A program's logits: BLOCK_M rows by BLOCK_N words, BLOCK_K of the width summed at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# (oldest capability, bytes of a number, see `by_pieces`). Not by the number of rows: a row's bits would depend on its
# neighbours. A panel has as many words either way.
LOGITS = Table(
    "_head.LOGITS",
    {
        (SM80, 2, False): HeadConfig(64, 128, 32, 8, 3),  # an address for every number: more of them spilled
        (SM80, 2, True): HeadConfig(128, 128, 64, 8, 3),
        (SM80, 4, True): HeadConfig(64, 64, 16, 8, 2),
    },
)


def wide(*tensors: Tensor) -> bool:
    """Whether Triton sees that rows may be read by 16 bytes."""
    return all(x.data_ptr() % 16 == 0 and x.shape[1] % 16 == 0 for x in tensors)


def by_pieces(*tensors: Tensor) -> bool:
    """Whether rows are read by 16 bytes, or by descriptors."""
    return wide(*tensors) or uses_descriptors(*tensors)


def uses_descriptors(*tensors: Tensor) -> bool:
    """From sm_90 on, where rows are whole pieces of 16 bytes."""
    pieces = (x.numel() and x.data_ptr() % 16 == 0 and x.shape[1] * x.itemsize % 16 == 0 for x in tensors)
    return capability_of(tensors[0].device) >= SM90 and all(pieces)


def as_matrix(x: Tensor, tma: bool, rows: int, columns: int) -> Tensor | TensorDescriptor:
    """What `load_tile` takes: x itself, or a descriptor of it in tiles of rows by columns."""
    return TensorDescriptor.from_tensor(x, [rows, columns]) if tma else x


@triton.jit
def head_logits(
    x_x, x_weight, p_bias, row, column, num_rows, width, vocab,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Logits of BLOCK_M rows and BLOCK_N words in fp32; -inf past the vocabulary."""
    b_logit = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, width, BLOCK_K):
        b_x = load_tile(x_x, row, k, num_rows, width, width, BLOCK_M, BLOCK_K, False, TMA)
        b_w = load_tile(x_weight, column, k, vocab, width, width, BLOCK_N, BLOCK_K, False, TMA)
        b_logit = tl.dot(b_x, b_w.T, b_logit, input_precision="ieee")
    o_V = column + tl.arange(0, BLOCK_N)
    b_bias = tl.load(p_bias + o_V, mask=o_V < vocab, other=0.0).to(tl.float32)
    return tl.where((o_V < vocab)[None, :], b_logit + b_bias[None, :], float("-inf"))


@triton.jit(do_not_specialize=[*COUNTS, "num_panels"])
def head_masses_kernel(
    x_x,  # [L, D], or a descriptor of it
    x_weight,  # [V, D], or a descriptor of it
    p_bias,  # [V]
    p_target,  # [L] int64 or None
    p_current,  # [L] int64 or None
    p_tops,  # [L, P] fp32: largest logit of the panel
    p_sums,  # [L, P] fp32: sum of e^((logit - largest) * scale); NaN where a logit is NaN or +inf
    p_at_target,  # [L] fp32: logit of the target
    p_at_current,  # [L] fp32: logit of the current token
    num_rows,
    width,
    vocab,
    num_panels,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Program: one panel for BLOCK_M rows; those of one panel follow each other, as they read the same weight."""
    parts = tl.cdiv(num_rows, BLOCK_M)
    row, i_P = tl.program_id(0) % parts * BLOCK_M, tl.program_id(0) // parts
    column = i_P * BLOCK_N
    o_L, o_V = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    m_L = o_L < num_rows
    b_logit = head_logits(
        x_x, x_weight, p_bias, row, column, num_rows, width, vocab, BLOCK_M, BLOCK_N, BLOCK_K, TMA
    )  # fmt: skip
    b_top = tl.max(b_logit, axis=1)
    b_reference = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_sum = tl.sum(tl.exp((b_logit - b_reference[:, None]) * scale), axis=1)
    o_LP = o_L.to(tl.int64) * num_panels + i_P
    tl.store(p_tops + o_LP, b_top, mask=m_L)
    tl.store(p_sums + o_LP, b_sum, mask=m_L)
    if p_target is not None:
        store_logit_of(p_at_target, p_target, b_logit, o_L, o_V, m_L, column, BLOCK_N)
    if p_current is not None:
        store_logit_of(p_at_current, p_current, b_logit, o_L, o_V, m_L, column, BLOCK_N)


@triton.jit
def store_logit_of(p_out, p_word, b_logit, o_L, o_V, m_L, column, BLOCK_N: tl.constexpr):
    """Each row's logit of its own word, where the word is in the panel."""
    b_word = tl.load(p_word + o_L, mask=m_L, other=-1)
    b_found = tl.sum(tl.where(o_V[None, :] == b_word[:, None], b_logit, 0.0), axis=1)
    tl.store(p_out + o_L, b_found, mask=m_L & (b_word >= column) & (b_word < column + BLOCK_N))


def masses(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor | None, current: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tops [L, P], sums [L, P], logits of the targets [L], of the current tokens [L]) of packed tensors."""
    config, tma = LOGITS.on(x.device, x.itemsize, by_pieces(x, weight)), uses_descriptors(x, weight)
    panels = blocks(len(weight), config.BLOCK_N)
    tops, sums = (x.new_empty(len(x), panels, dtype=torch.float32) for _ in range(2))
    at_target, at_current = (
        x.new_empty(0 if word is None else len(x), dtype=torch.float32) for word in (target, current)
    )
    launch(
        *(head_masses_kernel, (panels * blocks(len(x), config.BLOCK_M),)),
        *(as_matrix(x, tma, config.BLOCK_M, config.BLOCK_K), as_matrix(weight, tma, config.BLOCK_N, config.BLOCK_K)),
        *(bias, target, current, tops, sums, at_target, at_current, *x.shape, len(weight), panels, scale),
        TMA=tma,
        **options(config),
    )
    return tops, sums, at_target, at_current

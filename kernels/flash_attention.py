"""Attention over spans, forward and backward. Letters: T query rows, U key rows, N heads, H head width, B samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from uvg_engine.kernels._configs import Table, options
from uvg_engine.kernels._launch import SM80, SM90, SM100, AotCase, blocks, launch
from uvg_engine.kernels._spans import num_tiles, pad_width
from uvg_engine.kernels.flash_attention_backward import flash_attention_bwd_key_kernel, flash_attention_bwd_query_kernel
from uvg_engine.kernels.flash_attention_forward import flash_attention_fwd_kernel


@dataclass(frozen=True)
class AttentionConfig:
    """BLOCK_M queries by BLOCK_N keys. tma: descriptors bring the rows that are walked over."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    tma: bool = False
    maxnreg: int | None = None


# (oldest capability, bytes of a number, "odd" or nothing, widest head): see `shape_class`. fp32 is multiplied by the
# FMA units: see moe_mlp.PRODUCT.
FORWARD = Table(
    "flash_attention.FORWARD",
    {
        (SM80, 2, 64): AttentionConfig(128, 64, 8, 2, maxnreg=255),
        (SM80, 2, 128): AttentionConfig(128, 32, 8, 2),
        (SM80, 2, "odd", 127): AttentionConfig(64, 32, 8, 2),
        (SM80, 4, 32): AttentionConfig(32, 32, 8, 1, maxnreg=128),
        (SM80, 4, 64): AttentionConfig(32, 32, 8, 1),
        (SM80, 4, 127): AttentionConfig(32, 16, 8, 1, maxnreg=255),  # padded to 128
        (SM80, 4, 128): AttentionConfig(32, 32, 8, 1),
        (SM90, 2, 64): AttentionConfig(128, 128, 8, 2, tma=True),
        (SM90, 2, 128): AttentionConfig(128, 128, 8, 2, tma=True),
        (SM100, 2, 64): AttentionConfig(128, 64, 8, 3, tma=True, maxnreg=255),
        (SM100, 2, 128): AttentionConfig(128, 64, 8, 2, tma=True),
    },
)
QUERY = Table(
    "flash_attention.QUERY",
    {
        (SM80, 2, 32): AttentionConfig(128, 64, 8, 2, maxnreg=255),
        (SM80, 2, 63): AttentionConfig(64, 32, 8, 2, maxnreg=255),  # padded to 64
        (SM80, 2, 64): AttentionConfig(128, 64, 8, 2, maxnreg=255),
        (SM80, 2, 127): AttentionConfig(64, 64, 8, 2, maxnreg=208),  # padded to 128
        (SM80, 2, 128): AttentionConfig(64, 64, 8, 2),
        (SM80, 2, "odd", 127): AttentionConfig(64, 32, 8, 1, maxnreg=255),
        (SM80, 4, 31): AttentionConfig(32, 16, 8, 1, maxnreg=128),
        (SM80, 4, 32): AttentionConfig(32, 16, 4, 1),
        (SM80, 4, 64): AttentionConfig(32, 32, 8, 1),
        (SM80, 4, 128): AttentionConfig(16, 16, 8, 1, maxnreg=255),
        (SM90, 2, 32): AttentionConfig(128, 64, 8, 2, tma=True),
        (SM90, 2, 64): AttentionConfig(128, 64, 8, 2, tma=True),
        (SM90, 2, 128): AttentionConfig(128, 64, 8, 2, tma=True),
    },
)
KEY = Table(
    "flash_attention.KEY",
    {
        (SM80, 2, 64): AttentionConfig(32, 64, 8, 2, maxnreg=255),
        (SM80, 2, 128): AttentionConfig(32, 64, 8, 2),
        (SM80, 2, "odd", 127): AttentionConfig(32, 64, 8, 1),
        (SM80, 4, 31): AttentionConfig(32, 32, 8, 1, maxnreg=168),
        (SM80, 4, 32): AttentionConfig(32, 32, 8, 1),
        (SM80, 4, 64): AttentionConfig(32, 32, 8, 1),
        (SM80, 4, 128): AttentionConfig(16, 16, 8, 1, maxnreg=255),
        (SM90, 2, 64): AttentionConfig(64, 128, 8, 2, tma=True),
        (SM90, 2, 128): AttentionConfig(32, 128, 8, 2, tma=True),
        (SM100, 2, 64): AttentionConfig(64, 128, 8, 2, tma=True, maxnreg=255),
        (SM100, 2, 128): AttentionConfig(64, 64, 8, 2, tma=True),
    },
)


def shape_class(x: Tensor) -> tuple[int, int] | tuple[int, str, int]:
    """What the tables are asked for heads as those of x [rows, N, H]. "odd": wide, and no access of 16 bytes suits."""
    width, itemsize = x.shape[2], x.itemsize
    return (itemsize, "odd", width) if itemsize == 2 and width > 64 and width % 8 else (itemsize, width)


def _config(table: Table[AttentionConfig], *walked: Tensor) -> AttentionConfig:
    """The configuration for tensors [rows, N, H]; `walked` are those that a kernel walks over."""
    width, asked = walked[0].shape[2], shape_class(walked[0])
    config = table.on(walked[0].device, *asked)
    described = width == pad_width(width) and all(len(x) and x.data_ptr() % 16 == 0 for x in walked)
    return config if described or not config.tma else table.choose(SM80, *asked)


def _rows(x: Tensor, block: int, tma: bool) -> Tensor | TensorDescriptor:
    """What `load_rows` takes: x [rows, N, H] itself, or a descriptor of [rows, N * H] with blocks of one head."""
    return TensorDescriptor.from_tensor(x.flatten(1), [block, x.shape[2]]) if tma else x


def head_options(x: Tensor) -> dict[str, Any]:
    """Options of a launch for heads as those of x [rows, N, H], whatever the configuration."""
    return {"H": x.shape[2], "PRECISION": "ieee"}


def _options(config: AttentionConfig, x: Tensor) -> dict[str, Any]:
    chosen = options(config)
    return chosen | {"TMA": chosen.pop("tma")} | head_options(x)


def forward(q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.flash_attention.forward."""
    q, k, v, q_spans, k_spans = (x.contiguous() for x in (q, k, v, q_spans, k_spans))
    rows, heads, spans = *q.shape[:2], q_spans.shape[:2].numel()
    out, lse = torch.empty_like(q), q.new_empty((heads, rows), dtype=torch.float32)
    config = _config(FORWARD, k, v)
    launch(
        *(flash_attention_fwd_kernel, (num_tiles(rows, spans, config.BLOCK_M), heads)),
        *(q, *(_rows(x, config.BLOCK_N, config.tma) for x in (k, v)), out, lse, q_spans, k_spans),
        *(rows, heads, spans, q_spans.shape[1], k_spans.shape[1], scale),
        **_options(config, q),
    )
    return out, lse


def query_pass(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_spans: Tensor,
    k_spans: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(dq [T, N, H], delta fp32 [N, T]: the sum of dout * out for rows of a span). All arguments are packed."""
    rows, heads, spans = *q.shape[:2], q_spans.shape[:2].numel()
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    config = _config(QUERY, k, v)
    launch(
        *(flash_attention_bwd_query_kernel, (num_tiles(rows, spans, config.BLOCK_M), heads)),
        *(dout, out, lse, q, *(_rows(x, config.BLOCK_N, config.tma) for x in (k, v)), dq, delta, q_spans, k_spans),
        *(rows, heads, spans, q_spans.shape[1], k_spans.shape[1], scale),
        **_options(config, q),
    )
    return dq, delta


def key_pass(
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_spans: Tensor,
    k_spans: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(dk, dv), both [U, N, H]. delta as `query_pass` leaves it. All arguments are packed."""
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    config = _config(KEY, q, dout)
    launch(
        *(flash_attention_bwd_key_kernel, (blocks(len(k), config.BLOCK_N), k.shape[1])),
        *(*(_rows(x, config.BLOCK_M, config.tma) for x in (q, dout)), lse, delta, k, v, dk, dv, q_spans, k_spans),
        *(len(q), *k.shape[:2], len(q_spans), q_spans.shape[1], k_spans.shape[1], scale),
        **_options(config, q),
    )
    return dk, dv


def backward(dout: Tensor, out: Tensor, lse: Tensor, *forward_args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.flash_attention.backward."""
    *tensors, scale = forward_args
    dout, out, lse, *tensors = (x.contiguous() for x in (dout, out, lse, *tensors))
    dq, delta = query_pass(dout, out, lse, *tensors, scale)
    return dq, *key_pass(dout, lse, delta, *tensors, scale)


def _aot_call(rows: int, heads: int, width: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.empty(rows, heads, width, dtype=dtype, device="meta") for _ in range(3))
    spans = torch.empty(4, 2, 2, dtype=torch.int32, device="meta")
    out, lse = forward(q, k, v, spans, spans, 0.125)
    backward(out, out, lse, q, k, v, spans, spans, 0.125)


def _aot_case(rows: int, heads: int, width: int, dtype: torch.dtype, *shows: str, **changes: Any) -> AotCase:
    product = 2.0 * rows * (rows // 4) * heads * width
    kernels = ("flash_attention_fwd_kernel", "flash_attention_bwd_query_kernel", "flash_attention_bwd_key_kernel")
    return AotCase(
        f"4 samples T={rows} N={heads} H={width} {str(dtype)[6:]}",
        lambda: _aot_call(rows, heads, width, dtype),
        dict.fromkeys(kernels, shows),
        dict(zip(kernels, (2 * product, 3 * product, 4 * product), strict=True)),
        **changes,
    )


AOT_CASES = (
    _aot_case(131072, 12, 128, torch.bfloat16, "dot", "tma"),
    _aot_case(32768, 12, 128, torch.float16, "dot", "tma", tested=False),
    _aot_case(32768, 12, 64, torch.bfloat16, "dot", "tma"),
    _aot_case(2944, 4, 32, torch.bfloat16, "dot", "tma"),
    _aot_case(2944, 4, 80, torch.bfloat16, "dot"),
    _aot_case(2944, 4, 48, torch.bfloat16, "dot"),
    _aot_case(2944, 4, 65, torch.bfloat16, "dot"),
    _aot_case(2944, 4, 7, torch.float32),
    _aot_case(2944, 4, 31, torch.float32, tested=False),
    _aot_case(2944, 4, 32, torch.float32, tested=False),
    _aot_case(2944, 4, 64, torch.float32, tested=False),
    _aot_case(2944, 4, 128, torch.float32),
    _aot_case(2944, 4, 65, torch.float32),
)

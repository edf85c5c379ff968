"""Feed-forward experts over contiguous groups of rows. Letters: T rows, D width, F hidden width, E experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from uvg_engine.kernels._configs import ANY, Table, options
from uvg_engine.kernels._launch import (
    SM80,
    SM90,
    SM100,
    AotCase,
    Launch,
    blocks,
    launch,
    packed,
    power_of_two,
    programs,
)
from uvg_engine.kernels._spans import num_tiles
from uvg_engine.kernels.moe_mlp_gemm import (
    moe_mlp_bias_kernel,
    moe_mlp_rows_kernel,
    moe_mlp_tile_sums_kernel,
    moe_mlp_weights_kernel,
)

BIAS, GELU, GELU_BACKWARD = 0, 1, 2  # what `moe_mlp_rows_kernel` does to a product


@dataclass(frozen=True)
class GemmConfig:
    """A tile of BLOCK_M rows by BLOCK_N columns, BLOCK_K summed at a time; tma: by descriptors. held: programs that a
    multiprocessor has at once (the most of any kernel and chip: of more than that, some wait for their turn)."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    tma: bool = False
    maxnreg: int | None = None
    held: int = 1


@dataclass(frozen=True)
class SumsConfig:
    """Columns of a program that sums them."""

    BLOCK_N: int
    num_warps: int


# (oldest capability, bytes of a number, whether sizes are whole blocks, see `_whole`). fp32 is multiplied by the FMA
# units on every chip. TF32 has too few digits for the 2x rule, and the split products that Triton offers (tf32x3,
# bf16x6) are summed by tensor cores, whose rounding nothing here can vouch for.
PRODUCT = Table(
    "moe_mlp.PRODUCT",
    {
        (SM80, 4, False): GemmConfig(64, 64, 16, 8, 1, maxnreg=255),
        (SM80, 4, True): GemmConfig(64, 64, 16, 8, 2, maxnreg=168, held=2),
        (SM80, 2, False): GemmConfig(64, 64, 32, 8, 2, held=2),
        (SM100, 2, False): GemmConfig(64, 64, 32, 8, 1, maxnreg=255),
        (SM80, 2, True): GemmConfig(128, 128, 64, 8, 3),
        (SM90, 2, True): GemmConfig(128, 256, 64, 8, 3, tma=True),
    },
)
SUMS = Table("moe_mlp.SUMS", {(SM80, ANY): SumsConfig(64, 4)})


def _grid(x: Tensor, config: GemmConfig, tiles: int) -> tuple[int]:
    return (min(programs(x.device, config.held), tiles),)


def _matrix(x: Tensor, config: GemmConfig, rows: int, columns: int) -> Tensor | TensorDescriptor:
    """What `load_tile` takes: x itself, or a descriptor of it as a matrix."""
    return TensorDescriptor.from_tensor(x.flatten(0, -2), [rows, columns]) if config.tma else x


def _whole(k: int, *tensors: Tensor) -> bool:
    """Whether addresses are those of 16-byte pieces and k, where it counts the rows of an expert, is whole blocks: a
    descriptor does not tell where one expert's rows end."""
    aligned = all(x.numel() and x.data_ptr() % 16 == 0 and x.shape[-1] % 16 == 0 for x in tensors)
    return aligned and k % 64 == 0


def _config(k: int, *tensors: Tensor) -> GemmConfig:
    """The configuration for the two matrices of a product."""
    return PRODUCT.on(tensors[0].device, tensors[0].itemsize, _whole(k, *tensors))


def _options(config: GemmConfig) -> dict[str, Any]:
    chosen = options(config)
    del chosen["held"]
    return chosen | {"TMA": chosen.pop("tma"), "PRECISION": "ieee"}


def _rows_product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    epilogue: int,
    transposed: bool,
    pre: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(out where it is kept, hidden, column sums of the row tiles) of `moe_mlp_rows_kernel`: a [T, K] by b [E, N, K] or
    [E, K, N]."""
    num_n, num_k = b.shape[1:] if transposed else (b.shape[2], b.shape[1])
    config = _config(num_k, a, b)
    out = a.new_empty(len(a), num_n) if keep else None
    hidden = None if epilogue == BIAS else a.new_empty(len(a), num_n)
    tiles = num_tiles(len(a), len(b), config.BLOCK_M)
    sums = a.new_empty(tiles, num_n, dtype=torch.float32) if epilogue == GELU_BACKWARD else None
    b_block = (config.BLOCK_N, config.BLOCK_K) if transposed else (config.BLOCK_K, config.BLOCK_N)
    launch(
        *(moe_mlp_rows_kernel, _grid(a, config, tiles * blocks(num_n, config.BLOCK_N))),
        *(_matrix(a, config, config.BLOCK_M, config.BLOCK_K), _matrix(b, config, *b_block)),
        *(bias, pre, out, hidden, sums, offsets, len(b), num_n, num_k),
        EPILOGUE=epilogue,
        TRANSPOSED=transposed,
        PARTS=config.BLOCK_N // (32 if epilogue == GELU_BACKWARD else 64),
        BLOCK_E=power_of_two(len(b)),
        **_options(config),
    )
    return out, hidden, sums


def _weights_product(a: Tensor, b: Tensor, like: Tensor, offsets: Tensor) -> Tensor:
    """a^T b over the rows of each expert: a [T, M], b [T, N], the result [E, M, N] as `like`."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    experts, num_m, num_n = like.shape
    config = _config(0, a, b)
    tiles = experts * blocks(num_m, config.BLOCK_M) * blocks(num_n, config.BLOCK_N)
    launch(
        *(moe_mlp_weights_kernel, _grid(a, config, tiles)),
        *(_matrix(x, config, config.BLOCK_K, n) for x, n in ((a, config.BLOCK_M), (b, config.BLOCK_N))),
        *(out, offsets, experts, num_m, num_n),
        **_options(config),
    )
    return out


def _tile_sums(x: Tensor, offsets: Tensor, block: int) -> Tensor:
    """Column sums of each tile of `block` rows."""
    experts = len(offsets) - 1
    tiles = num_tiles(len(x), experts, block)
    sums = x.new_empty(tiles, x.shape[1], dtype=torch.float32)
    columns = SUMS.on(x.device, x.shape[1])
    launch(
        *(moe_mlp_tile_sums_kernel, (tiles, blocks(x.shape[1], columns.BLOCK_N))),
        *(x, sums, offsets, experts, x.shape[1]),
        BLOCK_M=block,
        BLOCK_E=power_of_two(experts),
        **options(columns),
    )
    return sums


def _bias_gradient(sums: Tensor, like: Tensor, offsets: Tensor, block: int) -> Tensor:
    """Sums of each expert's rows from those of tiles of `block` rows."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    columns = SUMS.on(out.device, like.shape[1])
    launch(
        *(moe_mlp_bias_kernel, (len(like), blocks(like.shape[1], columns.BLOCK_N))),
        *(sums, out, offsets, *like.shape),
        BLOCK_M=block,
        BLOCK_E=power_of_two(len(like)),
        **options(columns),
    )
    return out


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    group_offsets: Tensor,
    row_spans: Tensor | None,
    for_backward: bool,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results as in reference.moe_mlp.forward. Tiles and sums do not depend on the number of rows."""
    x, w1, b1, w2, b2, offsets = map(packed, (x, w1, b1, w2, b2, group_offsets))
    pre, hidden, _ = _rows_product(x, w1, b1, offsets, GELU, True, keep=for_backward)
    y, _, _ = _rows_product(hidden, w2, b2, offsets, BIAS, True)
    return y, pre


def backward(
    dy: Tensor, pre: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group_offsets: Tensor
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.moe_mlp.backward."""
    dy, pre, x, w1, w2, offsets = map(packed, (dy, pre, x, w1, w2, group_offsets))
    dpre, hidden, sums = _rows_product(dy, w2, None, offsets, GELU_BACKWARD, False, pre)
    block = _config(w2.shape[1], dy, w2).BLOCK_M
    db1 = _bias_gradient(sums, b1, offsets, block)
    db2 = _bias_gradient(_tile_sums(dy, offsets, block), b2, offsets, block)
    dw2 = _weights_product(dy, hidden, w2, offsets)
    dw1 = _weights_product(dpre, x, w1, offsets)
    dx, _, _ = _rows_product(dpre, w1, None, offsets, BIAS, False)
    return dx, dw1, db1, dw2, db2


def _aot_call(rows: int, width: int, hidden: int, dtype: torch.dtype) -> None:
    x, w1, b1, w2, b2 = (
        torch.empty(*shape, dtype=dtype, device="meta")
        for shape in ((rows, width), (2, hidden, width), (2, hidden), (2, width, hidden), (2, width))
    )
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    y, pre = forward(x, w1, b1, w2, b2, offsets, None, True)
    backward(y, pre, x, w1, b1, w2, b2, offsets)


def _tiles(launch: Launch) -> int:
    """Of the launches of `_rows_product` and `_weights_product`."""
    block_m, block_n = launch.options["BLOCK_M"], launch.options["BLOCK_N"]
    if launch.kernel is moe_mlp_weights_kernel:
        experts, num_m, num_n = launch.args[4:]
        return experts * blocks(num_m, block_m) * blocks(num_n, block_n)
    hidden_or_out = launch.args[5] if launch.args[4] is None else launch.args[4]
    experts, num_n = launch.args[8:10]
    return num_tiles(len(hidden_or_out), experts, block_m) * blocks(num_n, block_n)


def _aot_case(name: str, shape: tuple[int, int, int], dtype: torch.dtype, **changes: Any) -> AotCase:
    product = 2.0 * shape[0] * shape[1] * shape[2]
    shows = () if dtype == torch.float32 else ("dot", "tma") if name == "1.3B" else ("dot",)
    products = ("moe_mlp_rows_kernel", "moe_mlp_weights_kernel")
    expects = {**dict.fromkeys(products, shows), "moe_mlp_tile_sums_kernel": (), "moe_mlp_bias_kernel": ()}
    label = f"{name} T={shape[0]} D={shape[1]} F={shape[2]} {str(dtype)[6:]}"
    flops, tiles = dict.fromkeys(products, product), dict.fromkeys(products, _tiles)
    return AotCase(label, lambda: _aot_call(*shape, dtype), expects, flops, tiles, **changes)


AOT_CASES = (
    _aot_case("1.3B", (32768, 1536, 8960), torch.bfloat16),
    _aot_case("1.3B", (32768, 1536, 8960), torch.float16, tested=False),
    _aot_case("small", (2944, 128, 512), torch.float32),
    _aot_case("odd sizes", (2944, 200, 520), torch.bfloat16),
    _aot_case("odd sizes", (2944, 131, 517), torch.float32),
)

"""What the CUDA kernels ask of tensors, and how they are handed over: as fields of a params struct, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from uvg_engine.backends import devices, native

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CHUNK_ROWS = 64  # kChunkRows of csrc/cuda/column_sums.h
MAX_ROW_BYTES = 64 << 10  # of a row that a warp keeps in shared memory

_NOWHERE = 16  # address of an empty tensor, which has none: null says that there is no tensor
_ALIGNMENT = 16  # bytes

_simulator: ModuleType | None = None


@contextlib.contextmanager
def simulated(module: ModuleType) -> Iterator[None]:
    """Run the kernels on CPU tensors inside the block, by the simulator `module`: for tests."""
    global _simulator
    before, _simulator = _simulator, module
    try:
        yield
    finally:
        _simulator = before


def refuses_tensors(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> str | None:
    """Rules of every op: device, dtype, that the kernels were built, and what they run on."""
    for x in tensors:
        if x.device.type != ("cuda" if _simulator is None else "cpu"):
            return f"tensors are on {x.device.type}"
        if x.dtype not in dtypes:
            return f"dtype {x.dtype}; have {', '.join(str(d)[6:] for d in dtypes)}"
    if _simulator is not None:
        return None
    if torch.version.hip:
        return "the kernels are for NVIDIA GPUs"
    return native.why_no_driver() or devices.too_old(tensors[0].device)


def refuses_rows(x: Tensor, *more: Tensor) -> str | None:
    """Rules of the ops whose warps keep a row of x."""
    if (reason := refuses_tensors(x, *more)) is not None:
        return reason
    most = MAX_ROW_BYTES
    if _simulator is None:
        most = min(most, devices.shared_limit(x.device) // 2)  # a backward keeps two rows
    if x.dim() == 2 and x.shape[1] * x.element_size() > most:
        return f"width {x.shape[1]} in {x.dtype}; up to {most // x.element_size()} here"
    return None


def refuses_numbers(numbers: dict[str, Tensor]) -> str | None:
    """Coefficients per sample in fp32, by name."""
    for name, value in numbers.items():
        if value.dtype != torch.float32:
            return f"{name} of {value.dtype}; have float32"
    return None


def launch(kernel: str, like: Tensor, **fields: Any) -> None:
    """Call the launcher of csrc/cuda on the current stream of `like`'s device, with the fields of its params struct.

    Tensors must be packed and stay alive until this returns; None is a null pointer.
    """
    given = {name: _field(value) for name, value in fields.items()}
    if _simulator is not None:
        return getattr(_simulator, kernel)(0, **given)
    with torch.cuda.device(like.device):
        getattr(native.cuda(), kernel)(torch.cuda.current_stream(like.device).cuda_stream, **given)


def _field(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr() or _NOWHERE, value.nbytes
    if isinstance(value, torch.dtype):
        return DTYPES[value]
    return [_field(each) for each in value] if isinstance(value, list) else value


def aligned(x: Tensor) -> Tensor:
    """Packed, and at a multiple of 16 bytes: what asynchronous copies and pairs of floats ask for."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def as_floats(x: Tensor | None) -> Tensor | None:
    """A parameter as kernels read it: packed fp32."""
    return None if x is None else x.float().contiguous()


def floats_like(x: Tensor, *shape: int) -> Tensor:
    """Memory for fp32 values on x's device."""
    return torch.empty(*shape, dtype=torch.float32, device=x.device)


def partial_sums(x: Tensor, num_spans: int, parts: int) -> Tensor:
    """Memory in which sums over the rows of spans are made: [chunks, parts, width] of csrc/cuda/column_sums.h."""
    return floats_like(x, len(x) // CHUNK_ROWS + num_spans, parts, x.shape[1])

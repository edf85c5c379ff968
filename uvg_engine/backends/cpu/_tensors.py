"""What the kernels of the core ask of tensors, and how they are handed over: as addresses of packed values."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor

from uvg_engine.backends import native

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Given = TypeVar("Given", bound=Tensor | None)
_SMALL = 1 << 16  # values: beyond, torch's threads pay


def refuses_tensors(*tensors: Tensor) -> str | None:
    """CPU tensors in fp32, bf16 or fp16, and a native core to run them."""
    if native.cpu() is None:
        return native.why_not()
    for x in tensors:
        if not x.is_cpu:
            return f"tensors are on {x.device.type}"
        if x.dtype not in DTYPES:
            return f"dtype {x.dtype}; have float32, bfloat16, float16"
    return None


def refuses_mixed(*dtypes: torch.dtype) -> str | None:
    """Kernels of several dtypes have fp32 and one of 16 bits."""
    return "bfloat16 beside float16" if {torch.bfloat16, torch.float16} <= {*dtypes} else None


def refuses_numbers(numbers: dict[str, Tensor]) -> str | None:
    """Coefficients per sample in fp32, by name."""
    for name, value in numbers.items():
        if value.dtype != torch.float32:
            return f"{name} of {value.dtype}; have float32"
    return None


def at(x: Tensor | None) -> int:
    """Address of a packed tensor, 0 for none. The caller keeps it alive."""
    return 0 if x is None else x.data_ptr()


def packed(x: Given, dtype: torch.dtype | None = None) -> Given:
    """x as kernels read it: contiguous, in `dtype` (None: x's). None stays none. Where it is small, by the core: what
    torch does has no plan (`backends.plans`)."""
    if x is None or (x.is_contiguous() and (dtype is None or x.dtype == dtype)):
        return x
    dtype, numbers = dtype or x.dtype, _as_matrix(x) if x.numel() <= _SMALL else None
    if numbers is None or x.dtype not in DTYPES or dtype not in DTYPES:
        return cast(Given, x.to(dtype).contiguous())
    out = torch.empty(x.shape, dtype=dtype)
    native.core().pack_values(x.data_ptr(), *numbers, DTYPES[x.dtype], DTYPES[dtype], out.data_ptr())
    return cast(Given, out)


def _as_matrix(x: Tensor) -> tuple[int, ...] | None:
    """Rows, width, and from one row and one value to the next; None where the values have no such order."""
    if x.dim() == 2:
        return *x.shape, *x.stride()
    if x.dim() == 1:
        return 1, x.shape[0], 0, x.stride(0)
    if x.dim() > 2 and x.numel() and x[0].is_contiguous():
        return x.shape[0], x.numel() // x.shape[0], x.stride(0), 1
    return None


def as_floats(x: Given) -> Given:
    """A parameter as kernels read it: packed fp32."""
    return packed(x, torch.float32)


def new_floats(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32)

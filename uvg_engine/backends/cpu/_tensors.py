"""What the kernels of the core ask of tensors, and how they are handed over: as addresses of packed values."""

from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def refuses_tensors(*tensors: Tensor) -> str | None:
    """CPU tensors in fp32 or bf16, and a native core to run them."""
    if native.cpu() is None:
        return native.why_not()
    for x in tensors:
        if not x.is_cpu:
            return f"tensors are on {x.device.type}"
        if x.dtype not in DTYPES:
            return f"dtype {x.dtype}; have float32, bfloat16"
    return None


def refuses_numbers(numbers: dict[str, Tensor]) -> str | None:
    """Coefficients per sample in fp32, by name."""
    for name, value in numbers.items():
        if value.dtype != torch.float32:
            return f"{name} of {value.dtype}; have float32"
    return None


def at(x: Tensor | None) -> int:
    """Address of a packed tensor, 0 for none. The caller keeps it alive."""
    return 0 if x is None else x.data_ptr()


def packed(x: Tensor | None) -> Tensor | None:
    """Contiguous, none stays none."""
    return None if x is None else x.contiguous()


def as_floats(x: Tensor | None) -> Tensor | None:
    """A parameter as kernels read it: packed fp32."""
    return None if x is None else x.float().contiguous()


def new_floats(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32)

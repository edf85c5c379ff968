"""Kernels of torch's own ops under torch.autocast: it would round what they multiply, and what else it casts. No op of
ours follows it; what a call gives hangs on the dtypes of its arguments alone, on every backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from uvg_engine.backends import Kernel

_any = torch._C._is_any_autocast_enabled
_Without = torch._C._DisableAutocast  # on every device; torch's own compiled code leaves autocast by it


def left_out(kernel: Kernel) -> Kernel:
    """The same, without autocast inside. 0.15 us a call where there is none."""
    backward = kernel.backward and _without(kernel.backward)
    return Kernel(_without(kernel.forward), backward, kernel.refuses)


def _without(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def without(*args: Any) -> Any:
        if not _any():
            return function(*args)
        with _Without():
            return function(*args)

    return without

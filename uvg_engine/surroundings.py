"""What a calling program may have set for all of torch, and work that must not depend on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def cpu_by_default() -> Iterator[None]:
    """Within it a tensor made without a device is one of the CPU, whatever torch.set_default_device says."""
    with contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


def fp32_by_default() -> contextlib.AbstractContextManager[object]:
    """Within it modules of torch are built in fp32, whatever torch.set_default_dtype says: that holds for all threads,
    and is left as it is."""
    return contextlib.nullcontext() if torch.get_default_dtype() is torch.float32 else _Fp32()


class _Fp32(TorchFunctionMode):
    """What modules make their parameters of is fp32 where no dtype was asked for, in this thread alone."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.empty, torch.zeros, torch.ones) and kwargs.get("dtype") is None:
            kwargs = {**kwargs, "dtype": torch.float32}
        return function(*args, **kwargs)

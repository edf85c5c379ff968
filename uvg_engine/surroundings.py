"""What a calling program may have set for all of torch, and work that must not depend on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def cpu_by_default() -> contextlib.AbstractContextManager[object]:
    """Within it a tensor made without a device is one of the CPU, whatever torch.set_default_device says."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


@contextlib.contextmanager
def fresh_defaults() -> Iterator[None]:
    """`cpu_by_default`, and fp32 as torch's default dtype, which is that of all threads: not for a library's calls."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with cpu_by_default():
            yield
    finally:
        torch.set_default_dtype(before)

"""The CUDA kernels on the CPU: finds the simulator that the build made, and runs the cuda backend on it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from uvg_engine.backends.cuda import _tensors

BUILD = Path(__file__).resolve().parents[2] / "build/native"


@functools.cache
def module() -> ModuleType | None:
    """The module _cuda_sim of build/native, or None where it was not built (make test builds it with the rest)."""
    found = sorted(BUILD.glob("_cuda_sim.*"))
    if not found:
        return None
    spec = importlib.util.spec_from_file_location("_cuda_sim", found[0])
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@contextlib.contextmanager
def running() -> Iterator[None]:
    """The cuda backend serves CPU tensors inside, where the simulator was built."""
    made = module()
    with contextlib.nullcontext() if made is None else _tensors.simulated(made):
        yield

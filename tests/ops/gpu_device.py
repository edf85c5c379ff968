"""The tests of tests/ops on a GPU. A backend named "triton@gpu" is that backend with the tensors of every call moved
to the device below the op, and its results moved back: the tests stay on the CPU, as under Triton's interpreter. The op
layer with tensors of a device is what test_on_gpu.py asks about.

UVG_TEST_DEVICE=cpu stands in for a device that is not there: its tensors are copies in other memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import cuda_simulator
import pytest
import torch
from torch import Tensor

from uvg_engine import backends
from uvg_engine.backends import triton

THERE = torch.cuda.is_available() and not triton.interpreting()  # interpreted kernels stay on the CPU
DEVICE = os.environ.get("UVG_TEST_DEVICE") or ("cuda" if THERE else None)
OWN = ("cuda", "triton")  # backends with kernels of ours for a GPU
# Of the shared suite: no kernel has a part in it, or test_on_gpu.py asks for more.
NOT_MOVED = {"test_mistake", "test_a_second_derivative_is_refused", "test_the_plainest_case_is_served"}


def names(op: str) -> list[str]:
    """Those of OWN that have the op, as they are called on the device; none where there is no device."""
    return [f"{name}@gpu" for name in OWN if DEVICE and op in backends.table(name)]


def marked(*values: Any) -> Any:
    """Values of a parametrisation, marked gpu where one of them is named for the device."""
    on_gpu = any(isinstance(value, str) and value.endswith("@gpu") for value in values)
    return pytest.param(*values, marks=pytest.mark.gpu if on_gpu else ())


@contextlib.contextmanager
def forced(name: str) -> Iterator[str]:
    """Serve every op inside by the backend of this name, "triton@gpu" and the like among them; gives its own name. The
    CUDA kernels run in the simulator where they are not on the device."""
    name, _, place = name.partition("@")
    simulated = contextlib.nullcontext() if place and DEVICE == "cuda" else cuda_simulator.running()
    with simulated, moving(name) if place else contextlib.nullcontext(), backends.force(name):
        yield name


@contextlib.contextmanager
def moving(name: str) -> Iterator[None]:
    """The backend's kernels serve CPU tensors inside, on DEVICE."""
    table = backends.table(name)
    before = dict(table)
    table.update({op: moved_kernel(kernel) for op, kernel in before.items()})
    try:
        yield
    finally:
        table.update(before)


def moved_kernel(kernel: backends.Kernel) -> backends.Kernel:
    """The same, on copies of its arguments there."""
    backward = kernel.backward and _there_and_back(kernel.backward)
    return dataclasses.replace(
        kernel, forward=_there_and_back(kernel.forward), backward=backward, refuses=_there_and_back(kernel.refuses)
    )


def _there_and_back(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        result = function(*moved(args))
        if isinstance(result, tuple):
            return tuple(_back(part) for part in result)
        return _back(result)

    return call


def _back(value: Any) -> Any:
    return value.to("cpu") if isinstance(value, Tensor) else value


def moved(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments on DEVICE: strides, gaps, offsets into memory, and what shares memory, as they were."""
    memory: dict[tuple[int, torch.dtype], Tensor] = {}
    there: dict[int, Tensor] = {}

    def move(x: Tensor) -> Tensor:
        x = x.detach()
        key = x.untyped_storage().data_ptr(), x.dtype
        if key not in memory:
            count = x.untyped_storage().nbytes() // x.element_size()
            memory[key] = x.as_strided((count,), (1,), 0).to(DEVICE, copy=True)
        return memory[key].as_strided(x.shape, x.stride(), x.storage_offset())

    for x in args:
        if isinstance(x, Tensor) and id(x) not in there:
            there[id(x)] = move(x)
    return tuple(there[id(x)] if isinstance(x, Tensor) else x for x in args)

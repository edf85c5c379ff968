"""Tensors past 2^31 elements, and launches of which some programs run: what the tests of addresses stand on.

Memory is mapped and never reserved: a tensor of a terabyte costs the pages that are written. What nobody wrote is zero,
and long loops run their last steps: what they leave out would read zeros.
"""

import builtins
import importlib
import math
import mmap
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from uvg_engine.kernels import _launch

BF16, FP32 = torch.bfloat16, torch.float32
FAR = 2**31  # elements from which an int32 does not tell their number
MAPPED = 2**26  # bytes: what is smaller comes from torch
END = 8  # rows that are looked at
STEPS, LAST_STEPS = 1000, 4
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE; Python has the name from 3.13 on
KERNELS = Path(__file__).resolve().parents[2] / "kernels"

far_arguments = defaultdict(set)  # kernel: names of its arguments that were this large in some launch


def far(*shape, dtype=BF16):
    """Zeros of any size."""
    size = math.prod(shape) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    except OSError as error:
        pytest.skip(f"this machine maps no {size >> 30} GiB: {error}")
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def with_end(end, *shape):
    """A far tensor of this shape whose last elements are those of `end`."""
    x = far(*shape, dtype=end.dtype)
    x.view(-1)[-end.numel() :] = end.flatten()
    return x


class Mapped(TorchDispatchMode):
    """Inside, torch.empty and its kin give zeros, mapped where they are many."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ not in ("empty", "new_empty", "empty_like"):
            return function(*args, **kwargs)
        asked = function(*args, **(kwargs | {"device": "meta"}))
        large = asked.numel() * asked.itemsize >= MAPPED
        return far(*asked.shape, dtype=asked.dtype) if large else function(*args, **kwargs).zero_()


class Part(int):
    """A size of a grid of which the programs in `chosen` run."""

    def __new__(cls, size, chosen):
        part = super().__new__(cls, size)
        part.chosen = builtins.range(size)[chosen]
        return part


def short_range(*bounds):
    if len(bounds) == 1 and isinstance(bounds[0], Part):
        return bounds[0].chosen
    steps = builtins.range(*bounds)
    return steps if len(steps) <= STEPS else steps[-LAST_STEPS:]


LAST = slice(-1, None)
ALL = slice(None)


@pytest.fixture
def run_part(monkeypatch):
    """run(function, *args, kernel=(slices of the axes of its grid), ...): calls a host function, and runs those
    programs of its launches; of a kernel that is not named the last ones, and of its other axes all."""
    modules = [importlib.import_module(f"uvg_engine.kernels.{path.stem}") for path in KERNELS.glob("*.py")]
    for module in (interpreter, *modules):
        monkeypatch.setattr(module, "range", short_range, raising=False)

    def run(function, *args, others=LAST, **chosen):
        with _launch.recording(_launch.SM80) as launches, Mapped():
            result = function(*args)
        for launch in launches:
            named = zip(launch.kernel.arg_names, launch.args, strict=False)
            far_arguments[launch.name] |= {n for n, x in named if torch.is_tensor(x) and x.numel() >= FAR}
            slices = chosen.get(launch.name.removesuffix("_kernel"), (others,))
            grid = [Part(size, which) for size, which in zip(launch.grid, slices, strict=False)]
            launch.kernel[(*grid, *launch.grid[len(grid) :])](*launch.args, **launch.options)
        return result

    return run

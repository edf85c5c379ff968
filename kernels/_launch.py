"""How host functions start kernels, and what lets them be looked at without a GPU.

Every launch goes through `launch`. `recording` collects the launches in place of running them: host functions then
work on meta tensors, and what they would start is compiled ahead of time (bench/aot.py) or checked (tests).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

Capability = tuple[int, int]
SM80, SM90, SM100 = (8, 0), (9, 0), (10, 0)
ALL = (SM80, SM90, SM100)
NO_LARGE_TILES = (12, 0)
# Arguments that change from batch to batch (`do_not_specialize`): Triton would compile a kernel for 1, for multiples of
# 16 and for the rest of each. Numbers of latents are not among them: their masks tell how wide an access may be.
COUNTS = ("num_rows", "num_keys", "num_spans", "num_samples", "num_tokens", "num_slots", "num_blocks", "num_tiles")
COUNTS += ("latent_blocks", "walked", "Q_SPANS", "K_SPANS")
EVERY_LAUNCH = {"enable_fp_fusion": True}  # said aloud: Triton is about to change its default
# Of kernels with two ways to a result, of which a neighbour in the batch decides: a compiler may fuse a product with a
# sum in one of them alone.
ROUND_EACH = {"enable_fp_fusion": False}

_log = logging.getLogger("uvg_engine.kernels")
_recorder: ContextVar[list[Launch] | None] = ContextVar("uvg_kernels_recorder", default=None)
_target: ContextVar[Capability | None] = ContextVar("uvg_kernels_target", default=None)
_started: set[tuple[Any, ...]] = set()


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: its arguments as the host function gave them."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass(frozen=True)
class AotCase:
    """What a kernel module is compiled for ahead of time: a call of its host functions on meta tensors.

    A module lists its cases in `AOT_CASES`; together they reach each of its kernels and configurations, in every dtype.
    call: makes meta tensors and calls `forward`, `backward`. expects: kernel name to what its machine code must show:
    "dot" (the chip's own tensor-core instructions), "mma" (any that it has), "tma" (descriptor loads, from sm_90 on),
    "wide" (128-bit global accesses move three quarters of the bytes at least), "vector" (the same of the stores alone,
    and no single 16-bit access), "rounded" (no product is fused with a sum).
    flops: kernel name to floating-point operations of one launch, where the arithmetic counts for the time.
    tiles: name of a persistent kernel to what tells how many tiles (at most) the programs of a launch walk over.
    No spills, and shared memory within the chip's limit, are asked of every kernel. tested: the tests compile it too,
    not `python -m bench.aot` alone; the tested cases together reach every entry of the tables.
    """

    name: str
    call: Callable[[], object]
    expects: Mapping[str, tuple[str, ...]]
    flops: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    tiles: Mapping[str, Callable[[Launch], int]] = field(default_factory=lambda: MappingProxyType({}))
    capabilities: tuple[Capability, ...] = ALL
    tested: bool = True


@contextlib.contextmanager
def recording(capability: Capability) -> Iterator[list[Launch]]:
    """Collect launches in place of running them; configurations are those of `capability`."""
    found: list[Launch] = []
    recorder, target = _recorder.set(found), _target.set(capability)
    try:
        yield found
    finally:
        _recorder.reset(recorder)
        _target.reset(target)


@contextlib.contextmanager
def configured_for(capability: Capability) -> Iterator[None]:
    """Take the configurations of `capability` inside, whatever the device is: for tests under the interpreter."""
    token = _target.set(capability)
    try:
        yield
    finally:
        _target.reset(token)


def capability_of(device: torch.device) -> Capability:
    """Compute capability, by which configurations are chosen.

    ROCm devices, the interpreter, and NVIDIA's from 12.0 on count as sm_80: plain loads, no tensor descriptors. Those
    from 12.0 on have neither wgmma nor tcgen05, and no more shared memory than 8.6.
    """
    return _target.get() or _capability_of(device)


@functools.cache
def _capability_of(device: torch.device) -> Capability:
    if device.type != "cuda" or torch.version.hip:
        return SM80
    found = torch.cuda.get_device_capability(device)
    return found if found < NO_LARGE_TILES else SM80


def programs(device: torch.device, held: int) -> int:
    """Programs of a persistent kernel of which a multiprocessor holds so many at once."""
    return held * _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Three for the interpreter and meta tensors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` on the device of its first tensor. A grid with a zero starts nothing.

    args: the kernel's arguments in order. options: its constexprs by name, num_warps, num_stages. Never waits for the
    device. The first call of each specialisation is logged, as it compiles.
    """
    if 0 in grid:
        return
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append(Launch(kernel, grid, args, options))
        return
    if torch.version.hip:
        options.pop("maxnreg", None)  # Triton has it for NVIDIA's chips alone
    device = tensors_of(args)[0].device
    _tell_once(kernel, device, args, options)
    if device.type != "cuda":
        kernel[grid](*args, **EVERY_LAUNCH | options)
        return
    with torch.cuda.device(device), _may_load() if _captured() else contextlib.nullcontext():
        kernel[grid](*args, **EVERY_LAUNCH | options)


def _captured() -> bool:
    return torch.cuda.is_current_stream_capturing() and not torch.version.hip


@contextlib.contextmanager
def _may_load() -> Iterator[None]:
    """This thread may load code inside, though a CUDA graph is captured, which forbids it by itself.

    A kernel's first call loads it, and that may be the captured one: the calls before, which ought to have been the
    first, may have been served by a library that refuses while a graph is captured.
    """
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED; the driver gives the mode of before in its place
    _exchange(mode)
    try:
        yield
    finally:
        _exchange(mode)


def _exchange(mode: ctypes.c_int) -> None:
    error = _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    if error:
        raise RuntimeError(f"CUDA: cuThreadExchangeStreamCaptureMode gives error {error}")


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def tensors_of(args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors among a kernel's arguments, those under descriptors too."""
    bare = [x.base if isinstance(x, TensorDescriptor) else x for x in args]
    return [x for x in bare if isinstance(x, torch.Tensor)]


def _tell_once(kernel: Any, device: torch.device, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    dtypes = tuple(x.dtype for x in tensors_of(args))
    key = (kernel.__name__, device, dtypes, tuple(options.items()))
    if key in _started:
        return
    _started.add(key)
    told = ", ".join([*(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes)), *_pairs(options)])
    _log.info("first call of %s on %s (%s): compiled now unless Triton's cache has it", kernel.__name__, device, told)


def _pairs(options: Mapping[str, Any]) -> Iterator[str]:
    return (f"{name}={value}" for name, value in options.items())


def packed(x: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous, or None."""
    return None if x is None else x.contiguous()


def power_of_two(value: int) -> int:
    """The smallest power of two not below `value`."""
    return triton.next_power_of_2(value)


def blocks(count: int, size: int) -> int:
    """Number of blocks of `size` that hold `count`."""
    return triton.cdiv(count, size)

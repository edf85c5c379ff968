"""Triton's interpreter as these tests need it: right in bf16, strict about memory. Imported by conftest.py where
TRITON_INTERPRET=1, before the first kernel; the process is then for interpretation alone.

What stock Triton 3.7 and 3.9 do in place of it (test_triton_interpreter.py notices when that changes):
  bf16: arithmetic and tl.dot on the raw 16-bit patterns, fp32 to bf16 by truncation
  tl.dot adds in the order of numpy's library: a product and its transposed one differ, and so do rows and machines
  a comparison keeps the type of its left side: combined with a mask it becomes an integer
  a store or load beyond its tensor: a segmentation fault, or nothing
  two programs that store to one address: nothing
  every call of a device function patches triton.language anew: slow
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
BUILDER_METHODS = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_dot", "cast_impl", "create_fp_to_fp")
MEMORY_METHODS = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
STOCK = {name: getattr(InterpreterBuilder, name) for name in (*BUILDER_METHODS, *MEMORY_METHODS)}
STOCK_CALL, STOCK_PATCH_LANG = GridExecutor.__call__, interpreter._patch_lang


class OutOfBounds(IndexError):
    """A load, store or atomic touched memory of no tensor that was passed to the kernel."""


class Race(RuntimeError):
    """Two programs of one launch stored to the same address: which of them came last is chance on a GPU."""


def widened(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """fp32 to bf16 bit patterns, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def values(handle: TensorHandle) -> np.ndarray:
    return widened(handle.data) if is_bf16(handle) else handle.data


def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
    if op in COMPARISONS:
        return TensorHandle(op(values(lhs), values(rhs)), tl.int1)
    if is_bf16(lhs) or is_bf16(rhs):
        return TensorHandle(narrowed(op(values(lhs), values(rhs))), tl.bfloat16)
    return STOCK["binary_op"](self, lhs, rhs, op)


def unary_op(self: Any, arg: TensorHandle, op: Any) -> TensorHandle:
    if is_bf16(arg):
        return TensorHandle(narrowed(op(values(arg))), tl.bfloat16)
    return STOCK["unary_op"](self, arg, op)


def ternary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Any) -> TensorHandle:
    if is_bf16(other) and op is not np.where:
        return TensorHandle(narrowed(op(values(lhs), values(rhs), values(other))), tl.bfloat16)
    return STOCK["ternary_op"](self, lhs, rhs, other, op)


def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    if is_bf16(z):
        return TensorHandle(narrowed(values(x).astype(np.float64) * values(y) + values(z)), tl.bfloat16)
    return STOCK["create_fma"](self, x, y, z)


def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
    if is_bf16(a) or is_bf16(b) or a.data.dtype == b.data.dtype == np.float32:
        # once rounded: in which order numpy's library adds depends on the CPU, on the row and on what is transposed
        product = np.matmul(values(a).astype(np.float64), values(b).astype(np.float64))
        return TensorHandle(product.astype(np.float32) + d.data, d.dtype.scalar)
    return STOCK["create_dot"](self, a, b, d, *rest)


def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
    dst = dst_type.scalar
    if dst == tl.bfloat16:
        return TensorHandle(narrowed(values(src).astype(np.float32)), dst)
    if is_bf16(src):
        return TensorHandle(values(src).astype(interpreter._get_np_dtype(dst)), dst)
    return STOCK["cast_impl"](self, src, dst_type)


def create_fp_to_fp(self: Any, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
    if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
        return cast_impl(self, src, dst_type)
    return STOCK["create_fp_to_fp"](self, src, dst_type, rounding_mode)


class Watch:
    """The memory of one launch: where its tensors lie, and who stored where."""

    def __init__(self, arguments: list[Any]) -> None:
        ranges = dict(self.storages(arguments))
        self.starts = np.array(sorted(ranges), np.uint64)
        self.ends = np.array([ranges[start] for start in sorted(ranges)], np.uint64)
        self.stored: list[tuple[tuple[int, ...], np.ndarray]] = []

    def storages(self, arguments: Any) -> Any:
        for value in arguments:
            if isinstance(value, tuple):
                yield from self.storages(value)
            elif isinstance(value, TensorDescriptor):
                yield from self.storages((value.base,))
            elif isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()

    def touch(self, what: str, pointers: TensorHandle, mask: TensorHandle | np.ndarray | None) -> None:
        at = pointers.data
        if mask is not None:  # a descriptor's is a bare array
            mask = mask.data if isinstance(mask, TensorHandle) else mask
            at = at[np.broadcast_to(mask.astype(bool), at.shape)]
        at = at.ravel()
        if not at.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        index = np.searchsorted(self.starts, at, side="right").astype(np.int64) - 1
        outside = (index < 0) | (at + np.uint64(size) > self.ends[np.maximum(index, 0)])
        if outside.any():
            count, program = int(outside.sum()), interpreter.interpreter_builder.grid_idx
            raise OutOfBounds(f"{what}: {count} of {at.size} lanes of program {program} are in no tensor of the launch")
        if what == "store":
            self.stored.append((tuple(interpreter.interpreter_builder.grid_idx), np.unique(at)))

    def check_races(self, name: str) -> None:
        by_program: dict[tuple[int, ...], list[np.ndarray]] = {}
        for program, at in self.stored:
            by_program.setdefault(program, []).append(at)
        own = [np.unique(np.concatenate(found)) for found in by_program.values()]
        if own:
            counts = np.unique(np.concatenate(own), return_counts=True)[1]
            if (counts > 1).any():
                raise Race(f"{name}: {int((counts > 1).sum())} addresses are stored to by more than one program")


_watch: list[Watch] = []


def masked_load(self: Any, pointers: TensorHandle, mask: TensorHandle, *rest: Any, **options: Any) -> TensorHandle:
    _watch[-1].touch("load", pointers, mask)
    return STOCK["create_masked_load"](self, pointers, mask, *rest, **options)


def masked_store(self: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> None:
    _watch[-1].touch("store", pointers, mask)
    return STOCK["create_masked_store"](self, pointers, value, mask, *rest)


def atomic_rmw(self: Any, op: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
    _watch[-1].touch("atomic", pointers, mask)
    return STOCK["create_atomic_rmw"](self, op, pointers, value, mask, *rest)


def atomic_cas(self: Any, pointers: TensorHandle, *rest: Any) -> Any:
    _watch[-1].touch("atomic", pointers, None)
    return STOCK["create_atomic_cas"](self, pointers, *rest)


def call(self: Any, *arguments: Any, **options: Any) -> None:
    watch = Watch([*arguments, *options.values()])
    _watch.append(watch)
    try:
        STOCK_CALL(self, *arguments, **options)
        watch.check_races(self.fn.__name__)
    finally:
        _watch.pop()


class _Kept:
    """A patch of triton.language that stays: this process only interprets."""

    def restore(self) -> None:
        pass


_patched: set[frozenset[str]] = set()


def patch_lang(function: Any) -> _Kept:
    languages = frozenset(v.__name__ for v in function.__globals__.values() if v is tl or v is tl.core)
    if languages not in _patched:
        _patched.add(languages)
        STOCK_PATCH_LANG(function)
    return _Kept()


def no_bf16(self: Any, given: Any) -> None:
    """Reductions and scans of bf16 would add bit patterns; kernels widen before them."""
    for value in given:
        if value.dtype.scalar == tl.bfloat16:
            raise TypeError("a reduction or scan must not be in bfloat16, got one: widen to float32 first")
    STOCK_CHECK(self, given)


STOCK_CHECK = interpreter.ReduceScanOpInterface.check_tensor


def install() -> None:
    """Put the functions of this file into Triton's interpreter. For good: the process only interprets."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    for name in BUILDER_METHODS:
        setattr(InterpreterBuilder, name, globals()[name])
    for name, function in zip(MEMORY_METHODS, (masked_load, masked_store, atomic_rmw, atomic_cas), strict=True):
        setattr(InterpreterBuilder, name, function)
    GridExecutor.__call__ = call
    GridExecutor._restore_args_dev = lambda *args: None  # copies each tensor to itself: all are on the CPU
    interpreter._patch_lang = patch_lang
    interpreter.ReduceScanOpInterface.check_tensor = no_bf16

"""Weights in the form that the products of the cpu backend read: made once and kept as long as the weight lives.

A packed weight hangs on the weight's storage and goes with it; together they take about twice the memory, three times
in a 16-bit dtype whose products are computed in fp32 (fp16; bf16 too where the CPU has no instructions for it). It is
made again when the weight was written to, which its version tells, and after a step of one of torch's optimizers with
`fused=True`, which changes no version. Other writes that the version does not see (`weight.data`, `weight.numpy()`,
other libraries) are seen where they change one of 64 values that are looked at, as a new checkpoint does; after one
that may change few values or only in part of the weight, call `forget(weight)`. `UVG_PACKED_WEIGHTS=0` or `kept(False)`
packs for every call instead: slower, the same bits. So it is for weights made under inference_mode, which have no
version, and for those that are stored in another dtype than that of the products.
"""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from uvg_engine.backends import native

_NAME = "_uvg_packed_weights"  # of the attribute of a storage
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_keep = os.environ.get("UVG_PACKED_WEIGHTS", "1") != "0"
_bytes = 0
Asked = list[tuple[Tensor, str, Tensor, bool]]
_asked: ContextVar[Asked | None] = ContextVar("uvg_engine_asked_weights", default=None)
_MOST, _MOST_MORE = 2, 1 << 20  # kept of one storage: times its values, and bytes for the padding of many small weights
_LARGE = 1024  # rows and depth of a weight whose words are next to no padding


@dataclass(eq=False)
class _Packed:
    words: Tensor
    version: int
    mark: int


@contextlib.contextmanager
def kept(keep: bool) -> Iterator[None]:
    """Whether packed weights are kept inside the block. Those that were made before stay with their weights."""
    global _keep
    before, _keep = _keep, keep
    try:
        yield
    finally:
        _keep = before


@contextlib.contextmanager
def watched() -> Iterator[Asked]:
    """The weights that `packed` is asked for inside the block, in this thread, and keeps: (weight, op, words, whether
    they were made now)."""
    asked: Asked = []
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


def kept_bytes() -> int:
    """Memory of all packed weights that are kept."""
    return _bytes


def forget(weight: Tensor) -> None:
    """Drop what is kept of a weight and of all others in its storage: it was written to behind torch's back."""
    weight.untyped_storage().__dict__.pop(_NAME, None)


def keeper(weight: Tensor, op: str) -> _Packed | None:
    """What keeps the words of a weight now, or None. It goes with the weight, and when it is forgotten or packed anew,
    whoever holds the words."""
    found: _Packed | None = weight.untyped_storage().__dict__.get(_NAME, {}).get(_key(weight, op))
    return found


def _key(weight: Tensor, op: str) -> tuple[Any, ...]:
    return weight.storage_offset(), weight.shape, weight.dtype, op


def would_keep(weight: Tensor) -> bool:
    """Whether `packed` keeps the words of a weight where it is asked to."""
    return _keep and weight.is_contiguous() and not weight.is_inference()


def packed(weight: Tensor, keep: bool, op: str = "linear") -> Tensor:
    """int32 words of a weight [F, D] or of several [E, F, D], one after the other, for the instruction set in use.
    keep: for later calls too. op: that reads it, "linear" or "linear_int8"."""
    if not (keep and would_keep(weight)):
        return _pack(weight, op)
    store, key = weight.untyped_storage().__dict__.setdefault(_NAME, {}), _key(weight, op)
    found, version = store.get(key), weight._version
    mark = native.core().weight_mark(weight.data_ptr(), weight.nbytes)
    made: _Packed | None = None
    if found is None or found.version != version or found.mark != mark:
        store.pop(key, None)
        made = _Packed(_pack(weight, op), version, mark)
        most = _MOST * _times_as_large(weight.dtype, op) * weight.untyped_storage().nbytes() + _MOST_MORE
        if sum(p.words.nbytes for p in list(store.values())) > most:  # a copy: other threads may pack other parts
            store.clear()  # views of ever new sizes
        found = store[key] = made
        _count(found.words.nbytes)
        weakref.finalize(found, _count, -found.words.nbytes)
    if (asked := _asked.get()) is not None:
        asked.append((weight, op, found.words, made is not None))
    return found.words


def _times_as_large(dtype: torch.dtype, op: str) -> float:
    """Bytes of a packed weight to one of the weight's own, at least 1: 2 where 16-bit values are packed as fp32."""
    count, _ = _packers(op)
    return max(1.0, 4 * count(_LARGE, _LARGE, _DTYPES[dtype]) / (_LARGE**2 * dtype.itemsize))


def _packers(op: str) -> tuple[Any, Any]:
    core = native.core()
    if op == "linear_int8":
        return core.linear_int8_words, core.linear_int8_pack
    return core.linear_words, core.linear_pack


def _pack(weight: Tensor, op: str) -> Tensor:
    weight, number = weight.contiguous(), _DTYPES[weight.dtype]
    *stack, rows, depth = weight.shape
    count, pack = _packers(op)
    words = torch.empty(math.prod(stack), count(rows, depth, number), dtype=torch.int32)
    for one, out in zip(weight.view(len(words), rows, depth), words, strict=True):
        pack(one.data_ptr(), rows, depth, number, torch.get_num_threads(), out.data_ptr())
    return words


def _count(change: int) -> None:
    global _bytes
    _bytes += change


def _forget_stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"] if group.get("fused") else ():
            if type(weight) in (Tensor, torch.nn.Parameter):  # others, as DTensor, have no words here
                forget(weight)


register_optimizer_step_post_hook(_forget_stepped)

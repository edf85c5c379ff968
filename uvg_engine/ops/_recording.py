"""What a function did on the CPU, to be done again without Python's part in it.

A recording is a list of steps on fixed memory: the kernels of the native core that the function called, with the
numbers and addresses they got, and torch's own ops between them. It is to the CPU what a CUDA graph is to a GPU: the
same work on the same addresses, for functions whose course depends on shapes only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uvg_engine.backends import native, packed_weights
from uvg_engine.ops._registry import kernel_of

_UNPREDICTABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
_aten = torch.ops.aten
_EMPTY = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}

_COPIES = {_aten.clone, _aten.contiguous, _aten._to_copy}


class NotRecordable(RuntimeError):
    """The function did something that a recording cannot do again; the message says what."""


class Recording:
    """The steps of one run of `function()`, which makes no gradient and writes to no tensor that it did not make.

    result: what the function returned; its tensors are written anew by each `replay`. Tensors that the function reads
    are read again, where they were: change them in place. num_bytes: memory that is held for the steps. Raises
    NotRecordable where the course of the function hangs on a tensor's values or on random numbers, where it writes to
    another's tensor, leaves the CPU, has an op served by another backend than `cpu`, or makes more than most_bytes.
    """

    def __init__(self, function: Callable[[], Any], most_bytes: int = 1 << 62) -> None:
        recorder = _Recorder(most_bytes)
        core = native.core()
        with torch.no_grad(), native.standing_in(_Core(core, recorder)), packed_weights.watched() as weights, recorder:
            self.result = function()
        self._steps, self._held, self._weights = recorder.steps, recorder.held, weights
        self._made, self.num_bytes = recorder.made, recorder.num_bytes
        if not self._as_packed():
            raise NotRecordable("a weight has no version of its own")

    def replay(self) -> bool:
        """Do it again, into `result`. False, and nothing done, where a packed weight was written to since."""
        if not self._as_packed():
            return False
        with torch.no_grad():
            for step in self._steps:
                step()
        return True

    def _as_packed(self) -> bool:
        return all(packed_weights.packed(weight, True, op) is words for weight, op, words in self._weights)


class _Recorder(TorchDispatchMode):
    """Runs every op and notes what has to run again."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__()
        self.most_bytes, self.num_bytes = most_bytes, 0
        self.steps: list[Callable[[], Any]] = []
        self.made: list[Tensor] = []  # kept: steps write to their memory
        self.held: list[Any] = []  # all that steps read
        self.kernels = 0
        self._own: set[int] = set()  # storages of `made`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "uvg":
            before = self.kernels
            self.held.extend(args)  # kernels know addresses
            with self:
                out = kernel_of(func._schema.name)(*args, **kwargs)
            if self.kernels == before:
                raise NotRecordable(f"{func} was not served by the native core")
            return out
        if not _UNPREDICTABLE.isdisjoint(func.tags):
            raise NotRecordable(f"{func} depends on values or random numbers")
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        inputs, results = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), out))
        if not all(x.is_cpu for x in results):
            raise NotRecordable(f"{func} makes a tensor on another device")
        self.held.extend(inputs)
        if func._schema.is_mutable:
            if not all(x.untyped_storage()._cdata in self._own for x in results):
                raise NotRecordable(f"{func} writes to a tensor that was not made here")
            self.steps.append(partial(func, *args, **kwargs))
            return
        known = {x.untyped_storage()._cdata for x in inputs}
        fresh = [x for x in results if x.untyped_storage()._cdata not in known]
        if not fresh:  # a view
            return
        self.made.extend(fresh)
        stores = {store._cdata: store.nbytes() for store in (x.untyped_storage() for x in fresh)}
        self._own.update(stores)
        self.num_bytes += sum(stores.values())
        if self.num_bytes > self.most_bytes:
            raise NotRecordable(f"more than {self.most_bytes} bytes are made")
        if func.overloadpacket not in _EMPTY:
            self.steps.append(_again(func, args, kwargs, results))


class _Core:
    """The native core, whose kernels are noted as they are called."""

    def __init__(self, core: Any, recorder: _Recorder) -> None:
        self._core, self._recorder = core, recorder

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._core, name)

        def call(*args: Any) -> Any:
            out = function(*args)
            if out is None:  # a kernel writes to memory; what returns something tells a size
                self._recorder.steps.append(partial(function, *args))
                self._recorder.kernels += 1
            return out

        return call


def _again(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> Callable[[], Any]:
    """Computes into the first results."""
    if func.overloadpacket in _COPIES:
        return partial(results[0].copy_, args[0])
    packet, names = func.overloadpacket, [x.name for x in func._schema.arguments]
    for overload in ("out", f"{func._overloadname}_out"):
        if len(results) == 1 and overload in packet.overloads():
            variant = getattr(packet, overload)
            if [x.name for x in variant._schema.arguments] == [*names, "out"]:
                return partial(variant, *args, **kwargs, out=results[0])

    def again() -> None:
        out = func(*args, **kwargs)
        for old, new in zip(results, (x for x in tree_leaves(out) if isinstance(x, Tensor)), strict=True):
            old.copy_(new)

    return again

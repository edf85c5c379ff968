"""What a function did on the CPU, to be done again without Python's part in it.

A recording is a list of steps on fixed memory: the kernels of the native core that the function called, with the
numbers and addresses they got, and torch's own ops between them. It is to the CPU what a CUDA graph is to a GPU: the
same work on the same addresses, for functions whose course depends on shapes only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

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
    another's tensor, makes a tensor another one (`resize_`, `t_`), leaves the CPU, has an op served by another backend
    than `cpu`, or makes more than most_bytes at once; and where a first replay, over memory full of NaN, does not give
    the same bits. What is read behind torch, by `tolist()` or `numpy()`, has to be the same in every replay.
    """

    def __init__(self, function: Callable[[], Any], most_bytes: int = 1 << 62) -> None:
        for _ in range(2):  # a first run may have weights to pack
            recorder = _Recorder(most_bytes)
            kernels = native.standing_in(_Core(native.core(), recorder))
            with torch.no_grad(), kernels, packed_weights.watched() as weights, recorder:
                self.result = function()
            if not any(new for _, _, _, new in weights):
                break
        else:
            raise NotRecordable("a weight had to be packed twice")
        self._steps, self._held = recorder.steps, recorder.held
        self._weights = [(weight, op, weakref.ref(words)) for weight, op, words, _ in weights]  # they own their words
        self._blocks, self.num_bytes = recorder.blocks, recorder.num_bytes
        self._check()

    def replay(self) -> bool:
        """Do it again, into `result`. False, and nothing done, where a packed weight was written to since."""
        words = [packed_weights.packed(weight, True, op) for weight, op, _ in self._weights]  # held while it runs
        if not all(now is then() for now, (_, _, then) in zip(words, self._weights, strict=True)):
            return False
        with torch.no_grad():
            for step in self._steps:
                step()
        return True

    def _check(self) -> None:
        results = _tensors(self.result)
        want = [_bits(x).clone() for x in results]
        for block in self._blocks:
            _storage(block).fill_(255)
        if not self.replay() or not all(torch.equal(_bits(x), w) for x, w in zip(results, want, strict=True)):
            raise NotRecordable("a replay gave another result")


class _Recorder(TorchDispatchMode):
    """Runs every op and notes what has to run again.

    Memory is planned as an allocator would: a tensor without values is put where an earlier one lay that nobody holds
    any more. Steps hold aliases, which are counted, so that the rest of a storage's users are the function's own.
    """

    def __init__(self, most_bytes: int) -> None:
        super().__init__()
        self.most_bytes, self.num_bytes = most_bytes, 0
        self.steps: list[Callable[[], Any]] = []
        self.blocks: list[Tensor] = []  # one for each storage made here
        self.held: list[Any] = []  # what steps read and was made elsewhere
        self.kernels = 0
        self._ours: dict[int, int] = {}  # storage of a block -> how many of its tensors are ours

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "uvg":
            before = self.kernels
            self.held.extend(x for x in _tensors(args) if self._place(x) not in self._ours)  # kernels know addresses
            with self:
                out = kernel_of(func._schema.name)(*args, **kwargs)
            if self.kernels == before:
                raise NotRecordable(f"{func} was not served by the native core")
            return out
        if not _UNPREDICTABLE.isdisjoint(func.tags):
            raise NotRecordable(f"{func} depends on values or random numbers")
        if torch.Tag.inplace_view in func.tags:
            raise NotRecordable(f"{func} makes a tensor another one")
        if not all(self._place(x) in self._ours for x in _written(func, args, kwargs)):
            raise NotRecordable(f"{func} writes to a tensor that was not made here")
        out = func(*args, **kwargs)
        if not all(x.is_cpu and x.layout is torch.strided for x in _tensors(out)):
            raise NotRecordable(f"{func} makes a tensor on another device or without strides")
        return self._note(func, args, kwargs, out)

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        inputs, results = _tensors((args, kwargs)), _tensors(out)
        if func._schema.is_mutable:
            self.steps.append(partial(func, *self._aliases(args), **self._aliases(kwargs)))
            return out
        known = set(map(self._place, inputs))
        if all(self._place(x) in known for x in results):  # views
            self.held.extend(x for x in results if self._place(x) not in self._ours)  # a kernel may read them
            return out
        if func.overloadpacket in _EMPTY:
            if (block := self._free(out)) is not None:
                return _like(out, block)
            self._add(out)
            return out
        for result in results:
            if self._place(result) not in known:
                self._add(result)
        self.steps.append(_again(func, self._aliases(args), self._aliases(kwargs), self._aliases(results)))
        return out

    def _add(self, made: Tensor) -> None:
        if self._place(made) not in self._ours:
            self._ours[self._place(made)] = 0
            self.blocks.append(self._alias(made))
            self.num_bytes += made.untyped_storage().nbytes()
        if self.num_bytes > self.most_bytes:
            raise NotRecordable(f"more than {self.most_bytes} bytes are made")

    def _free(self, wanted: Tensor) -> Tensor | None:
        """A block of the size wanted that is ours alone."""
        size = wanted.untyped_storage().nbytes()
        if not hasattr(torch._C, "_storage_Use_Count"):  # it is private to torch
            return None
        for block in self.blocks:
            if block.untyped_storage().nbytes() == size and _users(block) == self._ours[self._place(block)]:
                return block
        return None

    def _aliases(self, values: Any) -> Any:
        return tree_map_only(Tensor, self._alias, values)

    def _alias(self, x: Tensor) -> Tensor:
        """x for a step to hold."""
        if self._place(x) not in self._ours:
            self.held.append(x)
            return x
        self._ours[self._place(x)] += 1
        return x.detach()

    @staticmethod
    def _place(x: Tensor) -> int:
        return x.untyped_storage()._cdata


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Those of the arguments that an op writes to."""
    written = [x.alias_info is not None and x.alias_info.is_write for x in func._schema.arguments]
    names = [x.name for x, writes in zip(func._schema.arguments, written, strict=True) if writes]
    return _tensors(([x for x, writes in zip(args, written) if writes], [kwargs.get(name) for name in names]))


def _users(x: Tensor) -> int:
    """Tensors on the storage of x."""
    store = x.untyped_storage()
    return torch._C._storage_Use_Count(store._cdata) - 1  # store itself


def _like(x: Tensor, block: Tensor) -> Tensor:
    """A tensor as x on the storage of a block."""
    return torch.empty(0, dtype=x.dtype).set_(block.untyped_storage(), 0, x.shape, x.stride())


def _bits(x: Tensor) -> Tensor:
    """The values of x, as bytes."""
    return x.contiguous().flatten().view(torch.uint8)


def _storage(x: Tensor) -> Tensor:
    """The whole storage of x, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


class _Core:
    """The native core, whose kernels are noted as they are called."""

    def __init__(self, core: Any, recorder: _Recorder) -> None:
        self._core, self._recorder = core, recorder

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("asks_"):
            raise NotRecordable("the course depends on values that are checked")
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

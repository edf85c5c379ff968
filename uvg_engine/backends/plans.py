"""Calls on the CPU that were made before, done again without Python's part in them.

A plan is what one call of an op did: which kernels of the native core ran, with which numbers, on which of the
arguments' addresses. The second call with the same key makes one, the next calls with that key use it. To the key
belong dtype, shape, strides and requires_grad of every tensor, whether it was made under inference_mode, which of
them are one tensor or lie at one place, the value of every other argument, and what the choice of a backend depends
on: `UVG_BACKENDS`, `force`, the number of threads, `packed_weights.kept`, modes of torch. Numbers that the call read
(spans, groups) have to be the same bytes; a packed weight has to hang on this tensor's storage, unwritten since and
not forgotten; a question (are the ids inside) needs the same answer. One key has several plans where these differ.

Of a call that wants a gradient a plan knows what the op, its rules met, gives to torch's autograd, and gives that; the
kernel there, and that of the backward, are calls with plans of their own.

All else takes the long way: what traces, looks on, has more than 8 MiB of arguments, where Python's part does not show,
or arguments that lie far apart in memory, whose copies would be large. Not seen, and taken to stay as they are: the
tables of the backends and `ORDER`; what is written to a packed weight through another storage, where `packed_weights`
does not look.

A plan is used after it gave the same bits as the long way, on other addresses, over memory full of NaN. It changes
nothing but time. `UVG_PLANS=0` or `kept(False)` makes and uses none. The log `uvg_engine.ops._plans` (DEBUG) tells once
for each op and reason why a call has none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

from uvg_engine.backends import native

_kept = os.environ.get("UVG_PLANS", "1") != "0"
_read: ContextVar[list[Tensor] | None] = ContextVar("uvg_engine_read_tensors", default=None)
_constants: ContextVar[list[Tensor] | None] = ContextVar("uvg_engine_constant_tensors", default=None)


@contextlib.contextmanager
def kept(keep: bool) -> Iterator[None]:
    """Whether plans are made and used inside the block, in all threads."""
    global _kept
    before = _kept
    _enable(keep)
    try:
        yield
    finally:
        _enable(before)


def _enable(keep: bool) -> None:
    global _kept
    _kept = keep
    if (core := native.cpu()) is not None:
        core.plans_enable(keep)


@contextlib.contextmanager
def watched() -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The tensors that `reads` and `constant` are told of inside the block, in this thread."""
    read: list[Tensor] = []
    constants: list[Tensor] = []
    tokens = _read.set(read), _constants.set(constants)
    try:
        yield read, constants
    finally:
        _read.reset(tokens[0])
        _constants.reset(tokens[1])


def reads(x: Tensor) -> Tensor:
    """x, whose numbers the host is about to read past torch (`numpy`, `tolist`): what it does may hang on them."""
    if (read := _read.get()) is not None:
        read.append(x)
    return x


def constant(x: Tensor) -> Tensor:
    """x, which was made of a call's shapes and numbers alone and which nobody writes to: a plan holds it."""
    if (constants := _constants.get()) is not None:
        constants.append(x)
    return x

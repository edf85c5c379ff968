"""Which code serves an op: one table per backend, a reason for every refusal.

An op is served by the first backend of the order that accepts the arguments. On an NVIDIA GPU the order depends on the
op, the GPU and the shape (`uvg_engine.backends.choice`). `force` pins one backend (an argument it refuses is then an
error that names the reason), `explain` tells what each backend says, `why` who serves a call and why.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

# Most specialised first; the reference accepts everything.
_GPU_ONLY = ("cuda", "triton", "flash_attn_3", "flash_attn", "cudnn")  # without Triton's interpreter
ORDER = (*_GPU_ONLY, "cpu", "sdpa", "reference")


@dataclass(frozen=True)
class Kernel:
    """How one backend serves one op. `refuses(*forward_args)` returns a reason, or None when it serves them."""

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    refuses: Callable[..., str | None] = lambda *args: None


class BackendRefused(ValueError):
    """A forced backend does not serve these arguments; the message names the backend, the op and the reason."""


_forced: ContextVar[str | None] = ContextVar("uvg_engine_forced_backend", default=None)
_held: ContextVar[tuple[Any, ...]] = ContextVar("uvg_engine_held_environment", default=())
_tables: dict[str, dict[str, Kernel]] = {}


def names() -> tuple[str, ...]:
    """Backends in the order in which they are asked, but for what the GPU and the shape change in it (`asked`).
    `UVG_BACKENDS` (comma-separated) narrows or reorders it."""
    return _names(_chosen(), ORDER)


def _chosen() -> str | bytes | None:
    """The value of UVG_BACKENDS now, or None. os.environ raises inside where it is not set: 0.7 us, its dict 0.05."""
    held = _held.get()
    return held[0] if held else _environment.get(_VARIABLE)


@contextlib.contextmanager
def environment_held() -> Iterator[None]:
    """UVG_BACKENDS stays what it is now inside the block, in this thread, whatever other threads set."""
    token = _held.set((_chosen(),))
    try:
        yield
    finally:
        _held.reset(token)


# Private to CPython; another Python is asked the long way.
_environment: Any = getattr(os.environ, "_data", os.environ)
_VARIABLE: Any = "UVG_BACKENDS" if _environment is os.environ else os.environ.encodekey("UVG_BACKENDS")


@functools.cache
def _names(chosen: str | bytes | None, order: tuple[str, ...]) -> tuple[str, ...]:
    if not chosen:
        return order
    chosen = os.fsdecode(chosen)
    picked = tuple(name.strip() for name in chosen.split(",") if name.strip())
    unknown = [name for name in picked if name not in order]
    if unknown or not picked:
        raise ValueError(f"UVG_BACKENDS must list backends out of {', '.join(order)}, got {chosen!r}")
    return picked


@functools.cache
def _of_cpu(chosen: str | bytes | None, order: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `_names` that may serve tensors on the CPU; the others would refuse every call, one by one."""
    order = _names(chosen, order)
    interpreting = importlib.import_module("uvg_engine.backends.triton").interpreting()
    return tuple(name for name in order if name not in _GPU_ONLY or (name == "triton" and interpreting)) or order


def table(backend: str) -> dict[str, Kernel]:
    """The ops that `backend` serves: op name -> Kernel. Loaded at first use."""
    if backend not in ORDER:
        raise ValueError(f"backend must be one of {', '.join(ORDER)}, got {backend!r}")
    if backend not in _tables:
        _tables[backend] = importlib.import_module(f"uvg_engine.backends.{backend}").TABLE
    return _tables[backend]


class force(contextlib.ContextDecorator):  # a generator would cost 1.3 us more
    """Serve every op inside the block by `backend`; what it refuses raises BackendRefused with the reason.

    The backward of an op called inside stays with it, wherever it runs. Code compiled by torch.compile does not carry
    this on: on the CPU have its backward inside the block too. On a GPU that runs, as what activation checkpoints
    compute again does, in a thread of torch's own: `UVG_BACKENDS` reaches it, and inside of
    `torch.autograd.set_multithreading_enabled(False)` there is none.
    """

    def __init__(self, backend: str) -> None:
        table(backend)
        self._backend = backend
        self._tokens: list[Token[str | None]] = []

    def _recreate_cm(self) -> force:
        """Of a decorated function every call enters one of its own: threads share no tokens."""
        return force(self._backend)

    def __enter__(self) -> None:
        self._tokens.append(_forced.set(self._backend))

    def __exit__(self, *error: object) -> None:
        _forced.reset(self._tokens.pop())


def forced() -> str | None:
    """The backend pinned by `force`, or None."""
    return _forced.get()


def _reason(backend: str, op: str, args: tuple[Any, ...]) -> str | None:
    kernel = table(backend).get(op)
    if kernel is None:
        return f"backend {backend} has no kernel for {op}"
    return kernel.refuses(*args)


def asked(op: str, args: tuple[Any, ...]) -> tuple[str, ...]:
    """The backends that are asked to serve `op` on the forward arguments `args`, in this order."""
    pinned = _forced.get()
    if pinned:
        return (pinned,)
    if args[0].is_cpu:
        return _of_cpu(_chosen(), ORDER)
    if not args[0].is_cuda:
        return names()
    if _chosen():
        return names()
    return _choice().order(op, args, ORDER).names


def _choice() -> Any:
    return importlib.import_module("uvg_engine.backends.choice")


def select(op: str, args: tuple[Any, ...], backward: bool = False) -> tuple[str, Kernel]:
    """The backend that serves `op` on the forward arguments `args`, and its kernel; with `backward` one that has it.
    BackendRefused when none does."""
    candidates = asked(op, args)
    for backend in candidates:
        kernel = (_tables.get(backend) or table(backend)).get(op)
        if kernel is not None and not (backward and kernel.backward is None) and kernel.refuses(*args) is None:
            return backend, kernel
    reasons = [f"{backend}: {_reason(backend, op, args) or 'it has no backward'}" for backend in candidates]
    raise BackendRefused(f"{op} is not served here: {'; '.join(reasons)}")


def explain(op: str, *args: Any) -> dict[str, str | None]:
    """What each backend says to `op(*args)`: None where it serves the call, else its reason.

    args: the tensors and numbers of the registered op, in the order of its schema; trailing ones may be left out
    only where `refuses` does not read them. Raises ValueError on an unknown op.
    """
    _require_op(op)
    return {backend: _reason(backend, op, args) for backend in ORDER}


def why(op: str, *args: Any) -> str:
    """For people: in which order the backends are asked to serve `op(*args)` and why, who serves it, and what those
    before it said. Arguments and errors as in `explain`."""
    _require_op(op)
    candidates = asked(op, args)
    if forced():
        reason = "forced"
    elif _chosen():
        reason = "UVG_BACKENDS"
    elif args[0].is_cuda:
        reason = _choice().order(op, args, ORDER).reason
    else:
        reason = f"{op} on {args[0].device.type}: the most specialised first"
    lines = [f"asked: {', '.join(candidates)}", f"because: {reason}"]
    for backend in candidates:
        refusal = _reason(backend, op, args)
        if refusal is None:
            return "\n".join([*lines, f"served by {backend}"])
        lines.append(f"{backend}: {refusal}")
    return "\n".join([*lines, "served by none of them"])


def _require_op(op: str) -> None:
    if op not in table("reference"):
        raise ValueError(f"op must be one of {', '.join(sorted(table('reference')))}, got {op!r}")

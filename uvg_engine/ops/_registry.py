"""Registers an op with torch: schema, fake, backend dispatch, autograd. The four hops of a call are
public function -> torch op -> backend table -> kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uvg_engine import backends

LIBRARY = torch.library.Library("uvg", "DEF")


def define(op: str, schema: str, fake: Callable[..., Any], check: Callable[..., None] | None = None) -> Any:
    """Define torch.ops.uvg.<op> (the forward of `op`) and return it. `fake` computes shapes and dtypes only.

    check(*args) raises ValueError on values that nobody could serve: spans beyond the rows, ids out of range. It runs
    on the CPU alone, where no backend then repeats it; on a device the host would have to wait for the values.
    Whatever a kernel or a fake returns comes out contiguous, so strides never depend on the backend.
    """

    def dispatch(*args: Any) -> Any:
        return backends.select(op, args)[1].forward(*args)

    def checked(*args: Any) -> Any:
        if check is not None:
            check(*args)
        return dispatch(*args)

    return _register(op, schema, fake, checked, dispatch)


def define_backward(op: str, schema: str, fake: Callable[..., Any], num_saved: int) -> Any:
    """Define torch.ops.uvg.<op>_bwd and return it.

    The first `num_saved` arguments of the backward are tensors that only a backward has (gradients, lse, ...); what
    follows is a prefix of the forward's arguments, by which the backend is chosen: the same rules for both.
    """

    def dispatch(*args: Any) -> Any:
        backend, kernel = backends.select(op, args[num_saved:])
        if kernel.backward is None:
            raise backends.BackendRefused(f"{op} has no backward on backend {backend}")
        return kernel.backward(*args)

    def twice(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{op} has no second derivative")

    function = _register(f"{op}_bwd", schema, fake, dispatch, dispatch)
    torch.library.register_autograd(f"uvg::{op}_bwd", twice, lib=LIBRARY)
    return function


def _register(
    name: str, schema: str, fake: Callable[..., Any], on_cpu: Callable[..., Any], on_cuda: Callable[..., Any]
) -> Any:
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, _packed(on_cpu), "CPU")
    LIBRARY.impl(name, _packed(on_cuda), "CUDA")
    torch.library.register_fake(f"uvg::{name}", _packed(fake), lib=LIBRARY)
    return getattr(torch.ops.uvg, name).default


def _packed(function: Callable[..., Any]) -> Callable[..., Any]:
    def packed(*args: Any) -> Any:
        result = function(*args)
        return result.contiguous() if isinstance(result, Tensor) else tuple(part.contiguous() for part in result)

    return packed


def autograd(op: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Attach a backward to torch.ops.uvg.<op>. It runs under the forward's `backends.force` unless another is in force;
    kept by hand, because autograd runs the backwards of a CUDA device in a thread of its own."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.forced = backends.forced()
        setup_context(ctx, inputs, output)

    def run(ctx: Any, *grads: Any) -> Any:
        if ctx.forced is None or backends.forced() is not None:
            return backward(ctx, *grads)
        with backends.force(ctx.forced):
            return backward(ctx, *grads)

    torch.library.register_autograd(f"uvg::{op}", run, setup_context=setup, lib=LIBRARY)


def no_gradient(op: str) -> None:
    """What torch.ops.uvg.<op> returns never requires a gradient, whatever a backend computes it with."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))

    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError(f"{op} is not differentiable")

    torch.library.register_autograd(f"uvg::{op}", backward, setup_context=setup, lib=LIBRARY)


def require(condition: bool, rule: str, value: Any) -> None:
    """Raise ValueError('<rule>, got <value>') unless `condition`: the one form in which a caller's mistake is told."""
    if not condition:
        raise ValueError(f"{rule}, got {value}")


def require_shape(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """`value` has this shape and, where given, this dtype. The text is built on failure only: checks run every call."""
    if value.shape != shape or (dtype is not None and value.dtype != dtype):
        want = f"{tuple(shape)}" if dtype is None else f"{tuple(shape)} {dtype}"
        raise ValueError(f"{name} must be {want}, got {describe(value)}")


def require_floating(name: str, value: Tensor, letters: str) -> None:
    """`value` is floating-point with as many dimensions as `letters` ("T, D") names."""
    if value.dim() != letters.count(",") + 1 or not value.is_floating_point():
        raise ValueError(f"{name} must be a floating-point ({letters}), got {describe(value)}")


def require_int64(name: str, value: Tensor, letters: str) -> None:
    """`value` is int64 with as many dimensions as `letters` ("L") names."""
    if value.dim() != letters.count(",") + 1 or value.dtype != torch.int64:
        raise ValueError(f"{name} must be an int64 ({letters}), got {describe(value)}")


def require_spans(name: str, spans: Tensor, last: int = 2, dims: int = 2) -> None:
    """Spans are int32 with (start, len, ...) in the last of `dims` dimensions."""
    if spans.dtype != torch.int32 or spans.dim() != dims or spans.shape[-1] != last:
        lead = "S" if dims == 2 else "B, M"
        raise ValueError(f"{name} must be an int32 ({lead}, {last}), got {describe(spans)}")


def require_inside(name: str, spans: Tensor, num_rows: int) -> None:
    """Every (start, len, ...) lies in [0, num_rows). Reads values: for the `check` of `define`."""
    starts, lengths = spans[..., 0].long(), spans[..., 1].long()
    if bool(((starts < 0) | (lengths < 0) | (starts + lengths > num_rows)).any()):
        raise ValueError(f"{name} must lie in [0, {num_rows}), got {spans.tolist()}")


def require_ids(name: str, ids: Tensor, count: int) -> None:
    """Every id lies in [0, count). Reads values: for the `check` of `define`."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise ValueError(f"{name} must lie in [0, {count}), got {int(ids.min())} to {int(ids.max())}")


def describe(value: Tensor) -> str:
    """Shape and dtype, as a message tells them."""
    return f"{tuple(value.shape)} {value.dtype}"

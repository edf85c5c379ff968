"""Registers an op with torch: schema, fake, backend dispatch, autograd. The four hops of a call are
public function -> torch op -> backend table -> kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uvg_engine import backends

LIBRARY = torch.library.Library("uvg", "DEF")


def define(op: str, schema: str, fake: Callable[..., Any]) -> Any:
    """Define torch.ops.uvg.<op> (the forward of `op`) and return it. `fake` computes shapes and dtypes only.

    Whatever a kernel or a fake returns comes out contiguous, so strides never depend on the backend.
    """

    def dispatch(*args: Any) -> Any:
        return backends.select(op, args).forward(*args)

    return _register(op, schema, fake, dispatch)


def define_backward(op: str, schema: str, fake: Callable[..., Any], num_saved: int) -> Any:
    """Define torch.ops.uvg.<op>_bwd and return it.

    The first `num_saved` arguments of the backward are tensors that only a backward has (gradients, lse, ...); what
    follows is a prefix of the forward's arguments, by which the backend is chosen: the same rules for both.
    """

    def dispatch(*args: Any) -> Any:
        kernel = backends.select(op, args[num_saved:])
        if kernel.backward is None:
            raise backends.BackendRefused(f"{op} has no backward on the chosen backend")
        return kernel.backward(*args)

    return _register(f"{op}_bwd", schema, fake, dispatch)


def _register(name: str, schema: str, fake: Callable[..., Any], dispatch: Callable[..., Any]) -> Any:
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, _packed(dispatch), "CPU")
    LIBRARY.impl(name, _packed(dispatch), "CUDA")
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


def require_spans(name: str, spans: Tensor, last: int = 2, dims: int = 2) -> None:
    """Spans are int32 with (start, len, ...) in the last of `dims` dimensions."""
    if spans.dtype != torch.int32 or spans.dim() != dims or spans.shape[-1] != last:
        lead = "S" if dims == 2 else "B, M"
        raise ValueError(f"{name} must be an int32 ({lead}, {last}), got {describe(spans)}")


def describe(value: Tensor) -> str:
    """Shape and dtype, as a message tells them."""
    return f"{tuple(value.shape)} {value.dtype}"

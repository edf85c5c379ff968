"""Registers an op with torch: schema, fake, backend dispatch, autograd. The four hops of a call are
public function -> torch op -> backend table -> kernel; a plain call on the CPU leaves the torch op out (`alone`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from uvg_engine import backends
from uvg_engine.backends import native, plans
from uvg_engine.ops._alone import CAN_TELL, alone
from uvg_engine.ops._plans import applied, planned, unseen

if CAN_TELL:
    from torch._C import _any_requires_grad
    from torch._C._functorch import (
        get_unwrapped,
        is_functorch_wrapped_tensor,
        is_gradtrackingtensor,
        peek_interpreter_stack,
    )

LIBRARY = torch.library.Library("uvg", "DEF")
_kernels: dict[str, Callable[..., Any]] = {}  # name -> what the torch op does on the CPU
_READ_ON_HOST = {"row_spans"}  # may be there whatever the device of the others
_applies: dict[str, Callable[..., Any]] = {}  # name -> the same with its gradient


def define(op: str, schema: str, fake: Callable[..., Any], check: Callable[..., None] | None = None) -> Any:
    """Define torch.ops.uvg.<op> (the forward of `op`) and return what calls it. `fake` computes shapes and dtypes only.

    check(*args) raises ValueError on values that nobody could serve: spans beyond the rows, ids out of range. It runs
    on the CPU alone, where no backend then repeats it; on a device the host would have to wait for the values.
    Whatever a kernel or a fake returns comes out contiguous, so strides never depend on the backend. A kernel gives
    None for a result that the arguments do not ask for; torch sees an empty tensor [0], a plain call may see the None.
    """

    def dispatch(*args: Any) -> Any:
        return backends.select(op, args)[1].forward(*args)

    if check is None:
        return _register(op, schema, fake, dispatch, dispatch)

    def checked(*args: Any) -> Any:
        check(*args)
        return backends.select(op, args)[1].forward(*args)

    return _register(op, schema, fake, checked, dispatch)


def define_backward(op: str, schema: str, fake: Callable[..., Any], num_saved: int) -> Any:
    """Define torch.ops.uvg.<op>_bwd and return it.

    The first `num_saved` arguments of the backward are tensors that only a backward has (gradients, lse, ...); what
    follows is a prefix of the forward's arguments, by which the backend is chosen: the same rules for both, so that it
    is the forward's unless that has no backward. The former come packed, whatever saved_tensors_hooks made of them.
    """

    def dispatch(*args: Any) -> Any:
        saved, forward = args[:num_saved], args[num_saved:]
        backward = backends.select(op, forward, backward=True)[1].backward
        assert backward is not None
        return backward(*[None if x is None else x.contiguous() for x in saved], *forward)

    def twice(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{op} has no second derivative")

    function = _register(f"{op}_bwd", schema, fake, dispatch, dispatch)
    torch.library.register_autograd(f"uvg::{op}_bwd", twice, lib=LIBRARY)
    return planned(function)


def _register(
    name: str, schema: str, fake: Callable[..., Any], on_cpu: Callable[..., Any], on_cuda: Callable[..., Any]
) -> Any:
    LIBRARY.define(f"{name}{schema}")
    op = getattr(torch.ops.uvg, name).default
    names = [argument.name for argument in op._schema.arguments]
    direct, kernel = _contiguous(on_cpu), _packed(on_cpu)
    LIBRARY.impl(name, kernel, "CPU")  # where a tensor is elsewhere, torch calls one of the others
    LIBRARY.impl(name, _on_one_device(_packed(on_cuda), names), "CUDA")
    torch.library.register_fake(f"uvg::{name}", _on_one_device(_packed(fake), names), lib=LIBRARY)
    _kernels[name] = kernel

    def call(*args: Any) -> Any:
        if not alone(args):
            if CAN_TELL and not is_compiling():
                if forward_ad._current_level >= 0:
                    _refuse_tangents(name, args)
                if peek_interpreter_stack() is not None and is_grad_enabled():
                    _refuse_transforms(name, args)
            return op(*args)
        if not (is_grad_enabled() and _any_requires_grad(*args)):
            return direct(*args)
        apply = _applies.get(name)
        if (ask := applied.get()) is not None:
            return ask(apply, args, len(op._schema.returns))
        return op(*args) if apply is None else apply(*args)

    call.__name__ = kernel.__name__ = name  # what the log calls them
    return call


def kernel_of(name: str) -> Callable[..., Any]:
    """What torch.ops.<name> ("uvg::linear") does on the CPU: checks, choice of the backend, kernel."""
    return _kernels[name.partition("::")[2]]


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Torch would drop them without a word."""
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args):
        raise NotImplementedError(f"{name} has no forward-mode derivative")


def _refuse_transforms(name: str, args: tuple[Any, ...]) -> None:
    """Torch's own words for a gradient at any level of torch.func speak of setup_context. vmap is served."""
    for x in args:
        while isinstance(x, Tensor) and is_functorch_wrapped_tensor(x):
            if is_gradtrackingtensor(x) and x.requires_grad:
                raise NotImplementedError(f"{name} has no gradient under torch.func; use torch.autograd.grad")
            x = get_unwrapped(x)


def _on_one_device(function: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """The function, for tensors of one device: a kernel would take an address of another one as its own."""

    def on_one_device(*args: Any) -> Any:
        device = args[0].device
        for name, x in zip(names, args, strict=False):
            if isinstance(x, Tensor) and x.device != device and not (name in _READ_ON_HOST and x.is_cpu):
                raise ValueError(f"{name} must be on {device} like {names[0]}, got {x.device}")
        return function(*args)

    return on_one_device


def _contiguous(function: Callable[..., Any]) -> Callable[..., Any]:
    def contiguous(*args: Any) -> Any:
        result = function(*args)
        if isinstance(result, Tensor):
            return result.contiguous()
        return tuple([None if part is None else part.contiguous() for part in result])

    return contiguous


def _packed(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `_contiguous`, with a tensor in place of every None, as torch's op must have it."""
    contiguous = _contiguous(function)

    def packed(*args: Any) -> Any:
        result = contiguous(*args)
        if isinstance(result, Tensor):
            return result
        return tuple([_nothing(result) if part is None else part for part in result])

    return packed


def _nothing(result: tuple[Tensor | None, ...]) -> Tensor:
    """An empty tensor on the device of the others: one on the CPU would keep torch.compile from CUDA graphs."""
    return torch.empty(0, device=next(part.device for part in result if part is not None))


def autograd(op: str, backward: Callable[..., Any], setup_context: Callable[..., Any], differentiable: int = 1) -> None:
    """Attach a backward to torch.ops.uvg.<op>. It runs under the forward's `backends.force` unless another is in force;
    kept by hand, because autograd runs the backwards of a CUDA device in a thread of its own. differentiable: so many
    results have a gradient, the first ones. Where it is one, the backward gets None of the others, no zeros."""
    setup, run = _both_ways(op, backward, setup_context, differentiable)
    torch.library.register_autograd(f"uvg::{op}", run, setup_context=setup, lib=LIBRARY)
    _applies[op] = _node(op, unseen(_kernels[op]), setup, run)


def another_form(
    op: str, kernel: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> Callable[..., Any]:
    """The op with its gradient by other functions, of arguments in another form: one node of autograd, where views
    around the op would be one each. As many arguments as the op's, the first result with a gradient. For calls that are
    `alone`, want a gradient and meet the op's rules."""
    apply = _node(op, unseen(kernel), *_both_ways(op, backward, setup_context, 1))
    count = len(getattr(torch.ops.uvg, op).default._schema.returns)

    def call(*args: Any) -> Any:
        return apply(*args) if (ask := applied.get()) is None else ask(apply, args, count)

    return call


def _both_ways(
    op: str, backward: Callable[..., Any], setup_context: Callable[..., Any], differentiable: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What a forward keeps, and the backward."""
    nothing = (None,) * len(getattr(torch.ops.uvg, op).default._schema.arguments)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.forced = backends.forced()
        if differentiable == 1:
            ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    def run(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return nothing
        grads = tuple([None if x is None else x.contiguous() for x in grads])  # here, as plans know packed ones alone
        if ctx.forced is None or backends.forced() is not None:
            return backward(ctx, *grads)
        with backends.force(ctx.forced):
            return backward(ctx, *grads)

    return setup, run


def _node(name: str, kernel: Callable[..., Any], setup: Callable[..., Any], run: Callable[..., Any]) -> Any:
    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        setup(ctx, args, output)
        return output

    functions = {"forward": staticmethod(forward), "backward": staticmethod(run)}
    function = type(name, (torch.autograd.Function,), functions)
    # Function.apply looks for transforms of torch.func first, as `alone` has done
    return vars(torch._C._FunctionBase)["apply"].__get__(None, function)


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
    _require_inside(name, spans, values_of(spans), num_rows)


def require_apart(name: str, spans: Tensor, num_rows: int) -> None:
    """As `require_inside`, and no row is in two of them."""
    values = values_of(spans)
    _require_inside(name, spans, values, num_rows)
    if not _apart(values, spans.shape[-1]):
        raise ValueError(f"{name} must not overlap, got {spans.tolist()}")


def _require_inside(name: str, spans: Tensor, values: bytes, num_rows: int) -> None:
    if not _inside(values, spans.shape[-1], num_rows):
        raise ValueError(f"{name} must lie in [0, {num_rows}), got {spans.tolist()}")


@functools.lru_cache(maxsize=4096)
def _inside(spans: bytes, last: int, num_rows: int) -> bool:
    starts, lengths = np.frombuffer(spans, np.int32).reshape(-1, last)[:, :2].astype(np.int64).T
    return not bool(((starts < 0) | (lengths < 0) | (starts + lengths > num_rows)).any())


@functools.lru_cache(maxsize=4096)
def _apart(spans: bytes, last: int) -> bool:
    starts, lengths = np.frombuffer(spans, np.int32).reshape(-1, last)[:, :2].astype(np.int64).T
    order = np.lexsort((lengths, starts))  # those of no row before those that begin with it
    ends = np.maximum.accumulate((starts + lengths)[order])
    return not bool(((starts[order][1:] < ends[:-1]) & (lengths[order][1:] > 0)).any())


def require_tiles(name: str, spans: Tensor, num_rows: int) -> None:
    """Spans (start, len) follow one another from row 0 to row `num_rows`. Reads values: for the `check` of `define`."""
    if not _tiles(values_of(spans), num_rows):
        raise ValueError(f"{name} must tile [0, {num_rows}) in order, got {spans.tolist()}")


@functools.lru_cache(maxsize=4096)
def _tiles(spans: bytes, num_rows: int) -> bool:
    starts, lengths = np.frombuffer(spans, np.int32).reshape(-1, 2).astype(np.int64).T
    ends = np.cumsum(lengths)
    rows = int(ends[-1]) if len(ends) else 0
    return rows == num_rows and not bool((lengths < 0).any()) and bool((starts == ends - lengths).all())


def values_of(spans: Tensor) -> bytes:
    """The numbers of an int32 table on the CPU: what checks remember it by, as batches come with the same tables."""
    return plans.reads(spans).numpy().tobytes()


_IDS = torch.int32, torch.int64


def require_ids(name: str, ids: Tensor, count: int) -> None:
    """Every id lies in [0, count). Reads values: for the `check` of `define`."""
    if native.cpu() is not None and ids.dtype in _IDS and ids.is_contiguous():  # a tenth of the time
        if native.core().asks_inside(ids.data_ptr(), ids.element_size(), ids.numel(), count):
            return
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise ValueError(f"{name} must lie in [0, {count}), got {int(ids.min())} to {int(ids.max())}")


def describe(value: Tensor) -> str:
    """Shape and dtype, as a message tells them."""
    return f"{tuple(value.shape)} {value.dtype}"

"""How plans of calls are made (`uvg_engine.backends.plans`). What uses them is in csrc/bindings_plans.cpp."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from uvg_engine import backends
from uvg_engine.backends import native, packed_weights, plans
from uvg_engine.ops import _alone

_MOST_BYTES = 8 << 20  # of arguments but weights that stay packed: beyond, Python's part does not show
_MOST_COPIED = 32 << 20  # bytes from an argument's first value to its last, of all of them
_MOST_MADE = 8 << 20  # bytes of results and of scratch, which stays with a thread
_aten = torch.ops.aten
_EMPTY = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_UNSAFE_VIEW = _aten._unsafe_view  # a view that autograd knows nothing of
_ARGUMENT, _MADE, _SCRATCH, _FIXED = range(4)  # what an address belongs to
_log = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])
_told: set[tuple[str, str]] = set()
# What is asked in place of torch, where a plan is made of a call that wants a gradient.
applied: ContextVar[Callable[..., Any] | None] = ContextVar("uvg_engine_applied", default=None)
planners: dict[Callable[..., Any], Any] = {}  # of what `planned` returned


class _NoPlan(Exception):
    """The call did something that a plan cannot do again: the message says what."""


def planned(function: Function) -> Function:
    """The function, done by plans where it was called like this before. It makes tensors and writes to no other."""
    planner = unseen(function)
    if planner is function:
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return function(*args, **kwargs)
        return planner(*args, **kwargs)

    planners[call] = planner
    return cast(Function, call)


def unseen(function: Function) -> Function:
    """As `planned`, for callers that torch.compile does not look at."""
    if not _begin():
        return function
    planner = native.core().planner(function, _make)
    planners[planner] = planner
    return cast(Function, planner)


@functools.cache
def _begin() -> bool:
    """Have the core make plans. False without a native core, or with a torch that does not tell what it takes."""
    core, exchange = native.cpu(), getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if core is None or exchange is None or not _alone.CAN_TELL or not isinstance(backends._environment, dict):
        return False
    core.plans_enable(plans._kept)
    base = torch._C.TensorBase
    modes = [torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack, torch._C._get_tracing_state]
    others = [torch._C._autograd._profiler_enabled, torch._C._functorch.peek_interpreter_stack, torch.get_num_threads]
    about = {
        **{"tensor": Tensor, "parameter": Parameter, "dtype": torch.dtype},
        **{"requires_grad": base.requires_grad, "version": base._version, "grad_enabled": torch.is_grad_enabled},
        **{"is_inference": base.is_inference, "storage": base.untyped_storage, "words": "words"},
        # Values that are kept negated, and names: DLPack tells neither.
        "never": [getattr(base, name) for name in ("is_neg", "has_names") if hasattr(base, name)],
        "functions": modes + others,
        "variables": [native._stand_in, packed_weights._asked, plans._read, backends._forced],
        "names": [
            (backends._environment, backends._VARIABLE),
            (vars(packed_weights), "_keep"),
            (vars(forward_ad), "_current_level"),
        ],
    }
    return bool(core.plans_begin(exchange, about))


def _make(
    planner: Any, question: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None
) -> Any:
    """The call, and a plan for the next one like it. question: the key of the call before it was made."""
    with packed_weights.watched() as weights:
        result = function(*args, **kwargs or {})
    core = native.core()
    try:
        with backends.environment_held():
            same = core.plan_same(question, args, kwargs)
            plan = None
            if same and question.wants_gradient:
                plan = _application(function, args, kwargs or {})
            elif same:
                plan = _plan(function, args, kwargs or {}, result, weights)
            if same and core.plan_same(question, args, kwargs):
                core.plan_keep(planner, question, plan)
            else:
                _tell(function.__name__, "another thread changed what it hangs on")
    except _NoPlan as reason:
        core.plan_refuse(planner, question)
        _tell(function.__name__, str(reason))
    except Exception as error:  # of ours or of another thread's doing: the call itself was served
        core.plan_refuse(planner, question)
        _tell(function.__name__, f"{type(error).__name__} while it was made", error)
    return result


def _tell(op: str, reason: str, error: Exception | None = None) -> None:
    """Log once why calls of an op have no plan."""
    if _log.isEnabledFor(logging.DEBUG) and (op, reason) not in _told:
        _told.add((op, reason))
        _log.debug("no plan of a call of %s: %s", op, reason, exc_info=error)


def _plan(function: Any, args: Any, kwargs: Any, result: Any, weights: packed_weights.Asked) -> Any:
    """The call as a plan that gave the same result. _NoPlan where it cannot be one."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    kept = {id(weight) for weight, _, _, _ in weights}
    _refuse(tensors, kept)
    if sum(_extent(x) for x in tensors if x.numel() and id(x) not in kept) > _MOST_COPIED:
        raise _NoPlan("arguments lie far apart")

    core, recorder, copies = native.core(), _Recorder(), _copies(tensors, kept)
    with native.standing_in(_Noting(core, recorder.steps)), plans.watched() as (read, constants), recorder:
        again = _call(function, args, kwargs, copies)
    addresses = {weight.data_ptr() for weight, _, _, _ in weights}
    if any(name == "weight_mark" and given[0] not in addresses for name, given, _ in recorder.steps):
        raise _NoPlan("a weight of inference_mode is packed every time")

    one, results = not isinstance(again, tuple), again if isinstance(again, tuple) else (again,)
    if not any(answer is None for _, _, answer in recorder.steps):
        raise _NoPlan("no kernel of the core wrote the results")
    made, ranges, scratch = recorder.memory(results)
    ranges += [(x.data_ptr(), _extent(x), _ARGUMENT, i, 0) for i, x in enumerate(copies) if x.numel()]
    ranges += [(words.data_ptr(), words.nbytes, _FIXED, 0, words.data_ptr()) for _, _, words, _ in weights]
    ranges += [(x.data_ptr(), x.nbytes, _FIXED, 0, x.data_ptr()) for x in _once(constants) if x.numel()]
    values = [_values(x, copies) for x in read if not _among(x, constants)]
    known = [_weight(*asked, tensors) for asked in weights]
    tensors_made = [x for x in results if x is not None]
    order = [-1 if x is None else _index(x, tensors_made) for x in results]
    plan = core.plan(values, recorder.steps, ranges, known, made, order, one, scratch, constants)

    args, kwargs = _swapped(args, kwargs, _copies(tensors, kept))
    if not _same(core.plan_prove(plan, args, kwargs), result):
        raise _NoPlan("it gave another result")
    return plan


def _application(function: Any, args: Any, kwargs: Any) -> Any:
    """The call, which wants a gradient, as what it gives to torch. _NoPlan where it does more than that."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    _refuse(tensors, set())
    asked: list[tuple[Any, tuple[Any, ...], Any]] = []

    def ask(apply: Any, given: tuple[Any, ...], count: int) -> Any:
        out = tuple([_Output() for _ in range(count)]) if count > 1 else _Output()
        asked.append((apply, given, out))
        return out

    token = applied.set(ask)
    try:
        with plans.watched() as (read, constants), _Recorder():
            result = function(*args, **kwargs)
    finally:
        applied.reset(token)
    if len(asked) != 1 or asked[0][0] is None:
        raise _NoPlan("it is not one op with a gradient")
    apply, given, out = asked[0]
    results = result if isinstance(result, tuple) else (result,)
    outputs = out if isinstance(out, tuple) else ()
    which = [] if result is out else [_index(x, outputs) for x in results]
    core, values = native.core(), [_values(x, tensors) for x in read if not _among(x, constants)]
    pairs = [
        (_index(x, tensors), None) if isinstance(x, Tensor) and not _among(x, constants) else (-1, x) for x in given
    ]
    return core.plan_application(values, apply, pairs, which, not isinstance(result, tuple))


class _Output:
    """In place of a result that torch would give."""

    def __getattr__(self, name: str) -> Any:
        raise _NoPlan("it does more than one op")


def _refuse(tensors: list[Tensor], kept: set[int]) -> None:
    """_NoPlan of a call that is not for the native core, is large, keeps a weight that is no argument, or that somebody
    looks on at."""
    if backends.forced() not in (None, "cpu"):
        raise _NoPlan("another backend is forced")
    if sum(x.nbytes for x in tensors if id(x) not in kept) > _MOST_BYTES:
        raise _NoPlan("arguments are large")
    if not kept <= {id(x) for x in tensors}:
        raise _NoPlan("a packed weight is no argument")
    if not _alone.alone(tuple(tensors)) or torch._C._len_torch_function_stack():
        raise _NoPlan("somebody looks on")


def _weight(weight: Tensor, op: str, words: Tensor, new: bool, tensors: list[Tensor]) -> tuple[Any, ...]:
    """How a plan knows a packed weight: by its place, its version and what keeps its words on its storage."""
    kept = packed_weights.keeper(weight, op)
    if kept is None or kept.words is not words:
        raise _NoPlan("a weight was packed anew")
    place, storage = weight.data_ptr(), weight.untyped_storage()
    return _index(weight, tensors), place, weight._version, storage, weakref.ref(kept)


class _Recorder(_alone.Onlooker):
    """Lets a function make memory and views, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, tuple[Any, ...], int | None]] = []  # kernel, arguments, answer
        self._made: list[Tensor] = []  # one for each storage, held so that each lies elsewhere
        self._held: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if func.overloadpacket in _EMPTY and out.is_cpu:
            self._made.append(out)
        elif not (func.is_view or func.overloadpacket is _UNSAFE_VIEW) or torch.Tag.inplace_view in func.tags:
            raise _NoPlan(f"torch's {func} ran")
        self._held.append(out)
        return out

    def memory(self, results: Sequence[Tensor | None]) -> tuple[list[Any], list[Any], int]:
        """How to make the results, where what was made lies, and the bytes of what is no result."""
        made: list[Any] = []
        places, scratch, total = [], 0, 0
        storages = {x.untyped_storage()._cdata: x for x in self._made}
        for x in results:
            if x is None:
                continue
            if type(x) is not Tensor or storages.pop(x.untyped_storage()._cdata, None) is None or not x.is_contiguous():
                raise _NoPlan("a result is an argument, twice the same or no packed tensor")
            if x.nbytes != x.untyped_storage().nbytes():
                raise _NoPlan("a result is a part of its memory")
            places.append((x.data_ptr(), x.nbytes, _MADE, len(made), 0))
            made.append((torch.empty_strided, (tuple(x.shape), tuple(x.stride())), {"dtype": x.dtype}))
            total += x.nbytes
        for x in storages.values():
            size = x.untyped_storage().nbytes()
            places.append((x.untyped_storage().data_ptr(), size, _SCRATCH, 0, scratch))
            scratch += -(-size // 64) * 64
        if total + scratch > _MOST_MADE:
            raise _NoPlan("it makes much memory")
        return made, places, scratch


class _Noting:
    """The native core, whose kernels are noted as they are called."""

    def __init__(self, core: Any, steps: list[Any]) -> None:
        self._core, self._steps = core, steps

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._core, name)

        def call(*args: Any) -> Any:
            answer = function(*args)
            self._steps.append((name, args, answer))
            return answer

        return call


def _index(x: Any, others: Sequence[Any]) -> int:
    for i, other in enumerate(others):
        if other is x:
            return i
    raise _NoPlan("something was made between")


def _among(x: Any, tensors: list[Tensor]) -> bool:
    return any(x is each for each in tensors)


def _once(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(x): x for x in tensors}.values())


def _values(x: Tensor, copies: list[Tensor]) -> tuple[int, bytes]:
    """Which argument was read, and its numbers."""
    for i, copy in enumerate(copies):
        if copy.data_ptr() == x.data_ptr() and copy.nbytes == x.nbytes and x.is_contiguous() and copy.is_contiguous():
            return i, x.detach().numpy().tobytes()
    raise _NoPlan("numbers were read that are no argument")


def _extent(x: Tensor) -> int:
    """Bytes from the first value of x to its last."""
    return (1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def _copies(tensors: list[Tensor], kept: set[int]) -> list[Tensor]:
    """The tensors at other addresses, each in memory of its own but those that lie at one place; no packed weights."""
    sizes: dict[int, int] = {}
    for x in tensors:
        if x.numel():
            sizes[x.data_ptr()] = max(sizes.get(x.data_ptr(), 0), _extent(x))
    memory: dict[int, Tensor] = {}
    copies: dict[int, Tensor] = {}
    with torch.no_grad():
        for x in tensors:
            if id(x) in copies:
                continue
            if id(x) in kept:
                copies[id(x)] = x
                continue
            place, size = x.data_ptr(), sizes.get(x.data_ptr(), 0) if x.numel() else 0
            if place not in memory or not size:
                bytes_ = torch.empty(0, dtype=torch.uint8).set_(
                    x.untyped_storage(), x.storage_offset() * x.element_size() if size else 0, (size,), (1,)
                )
                memory[place] = bytes_.clone()
            copy = torch.empty(0, dtype=x.dtype).set_(memory[place].untyped_storage(), 0, x.shape, x.stride())
            copies[id(x)] = copy.requires_grad_(x.requires_grad)
    return [copies[id(x)] for x in tensors]


def _swapped(args: Any, kwargs: Any, copies: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with these tensors in place of theirs."""
    rest = iter(copies)
    args = tuple([next(rest) if isinstance(x, Tensor) else x for x in args])
    return args, {name: next(rest) if isinstance(x, Tensor) else x for name, x in kwargs.items()}


def _call(function: Any, args: Any, kwargs: Any, copies: list[Tensor]) -> Any:
    args, kwargs = _swapped(args, kwargs, copies)
    return function(*args, **kwargs)


def _same(got: Any, want: Any) -> bool:
    """Whether two results have the same parts, down to the bits."""
    if isinstance(want, tuple):
        return isinstance(got, tuple) and len(got) == len(want) and all(map(_same, got, want))
    if not isinstance(want, Tensor):
        return got is want
    return isinstance(got, Tensor) and _form(got) == _form(want) and torch.equal(_bits(got), _bits(want))


def _form(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.shape, x.stride(), x.is_inference(), x.requires_grad


def _bits(x: Tensor) -> Tensor:
    """The values of x as whole numbers: NaN is equal to itself."""
    return x.detach().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])

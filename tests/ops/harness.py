"""What every op is put through. A test file gives the op, its cases and its mistakes, and adds the op's own properties.

The 2x rule: truth is the reference in fp64 on the same rounded inputs; a backend may err at most twice as much as the
reference does in the same dtype, plus two ulps of the largest value. NaN fails. Memory that a kernel forgets to write
is NaN here. Whatever takes `backend` runs on every backend that has the op (conftest.py).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import cuda_simulator
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from uvg_engine import backends, ops
from uvg_engine.backends import native, triton

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
GRADCHECK_ELEMENTS = 100  # numerical differentiation takes two calls per element; larger cases: in random directions
# Backends whose hardware every machine has: they must serve the plainest case, not only explain why not.
EVERYWHERE = {"sdpa", "reference"} | ({"cpu"} if native.cpu() else set())
ON_GPU_ALONE = {"flash_attn_3", "flash_attn", "cudnn"}  # libraries: test_on_gpu.py, tests/test_gpu_libraries.py
if triton.interpreting():
    EVERYWHERE.add("triton")
if cuda_simulator.module():
    EVERYWHERE.add("cuda")


def backends_of(op: str) -> list[str]:
    """The backends that have the op and may serve tensors of the CPU."""
    return [name for name in backends.ORDER if op in backends.table(name) and name not in ON_GPU_ALONE]


@dataclass(frozen=True)
class Case:
    """Inputs of one call, as keyword arguments in fp64, made from a generator of fixed seed."""

    name: str
    make: Callable[[torch.Generator], dict[str, Any]]
    wide: tuple[str, ...] = ()  # stay in fp32 where the rest is narrower
    constant: tuple[str, ...] = ()  # floating-point, but get no gradient
    dtypes: tuple[torch.dtype, ...] = (FP32, BF16, FP16)
    smooth: bool = True  # can be differentiated numerically
    ulps: int = 64  # a reference worse than this in its own dtype would hide an accumulation in too few bits

    def inputs(self, dtype: torch.dtype, strided: bool = False) -> dict[str, Any]:
        made = self.make(torch.Generator().manual_seed(1234))
        for name, value in made.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                wide = name in self.wide and dtype != FP64
                made[name] = value.to(FP32 if wide else dtype)
            if strided and isinstance(value, Tensor):
                made[name] = with_gaps(made[name])
        return made

    def leaves(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        floats = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return {name: value for name, value in floats.items() if name not in self.constant}


@dataclass(frozen=True)
class Mistake:
    """A call that must be refused: the first case's inputs with some of them replaced."""

    match: str  # pattern that the message must contain: argument and rule
    changes: dict[str, Any] = field(default_factory=dict)  # a callable gets the proper value

    def applied(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs | {n: c(inputs[n]) if callable(c) else c for n, c in self.changes.items()}


def with_gaps(x: Tensor) -> Tensor:
    """The same values, every other element of a buffer whose gaps are poison, first and last dimension swapped."""
    if x.dim() == 0:
        return x
    shape = x.transpose(0, -1).shape
    buffer = torch.full((*shape[:-1], 2 * shape[-1]), math.nan if x.is_floating_point() else 0, dtype=x.dtype)
    view = buffer[..., ::2].transpose(0, -1)
    view.copy_(x)
    return view


@contextlib.contextmanager
def poisoned(warn_only: bool = False) -> Iterator[None]:
    """torch.empty gives NaN (integers: the largest) inside. warn_only: of a library's op that is not deterministic."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the differentiable outputs, already rounded to their dtypes, beside them."""
    g = torch.Generator().manual_seed(99)
    return [torch.randn(o.shape, generator=g, dtype=FP64).to(o.device, o.dtype) for o in outputs if o.requires_grad]


Results = tuple[tuple[Tensor, ...], dict[str, Tensor], list[Tensor]]


def run(
    function: Callable[..., Any], case: Case, inputs: dict[str, Any], douts: Sequence[Tensor] | None = None
) -> Results:
    """(outputs, gradient of each leaf by name, the cotangents used)."""
    leaves = {name: value.detach().requires_grad_() for name, value in case.leaves(inputs).items()}
    outputs = as_tuple(function(**(inputs | leaves)))
    douts = cotangents(outputs) if douts is None else [d.to(FP64) for d in douts]
    followed = [o for o in outputs if o.requires_grad]
    grads: Sequence[Tensor] = ()
    if followed:
        grads = torch.autograd.grad(followed, list(leaves.values()), douts)
    return tuple(o.detach() for o in outputs), dict(zip(leaves, grads, strict=bool(followed))), list(douts)


def ulp(truth: Tensor, dtype: torch.dtype) -> float:
    """Spacing of dtype's numbers at the largest value of `truth`."""
    largest = float(truth.abs().max())
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(largest, info.tiny)))


def assert_2x(name: str, ulps: int, got: Tensor, same_dtype: Tensor, truth: Tensor, further: int = 0) -> None:
    """The 2x rule for one tensor. Integers, and what is infinite in truth, must be equal."""
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"
    assert got.dtype == same_dtype.dtype, f"{name}: dtype {got.dtype}, not {same_dtype.dtype}"
    assert got.is_contiguous(), f"{name}: strides {got.stride()}"
    if not got.is_floating_point():
        assert torch.equal(got, truth.to(got.dtype)), f"{name}: integers differ"
        return
    assert not got.isnan().any(), f"{name}: NaN"
    finite = truth.isfinite()
    assert torch.equal(got[~finite].double(), truth[~finite]), f"{name}: infinities differ"
    got, same, truth, dtype = got[finite].double(), same_dtype[finite].double(), truth[finite], got.dtype
    if not truth.numel():
        return
    error, reference, unit = float((got - truth).abs().max()), float((same - truth).abs().max()), ulp(truth, dtype)
    assert error <= 2 * reference + (2 + further) * unit, (
        f"{name}: error {error:.3g}, reference {reference:.3g}, ulp {unit:.3g}"
    )
    assert reference <= ulps * unit, f"{name}: the reference errs by {reference / unit:.1f} ulps"


class Recorder(TorchDispatchMode):
    """Notes the calls of torch.ops.uvg made inside, as (op, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "uvg":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


class OpSuite:
    """Subclass as Test<Op> with `op`, `cases` and `mistakes`; the first case also meets compilation and strides."""

    op: str
    cases: tuple[Case, ...]
    mistakes: tuple[Mistake, ...]
    further = 0  # ulps allowed in every result
    # Further ulps of (backend, dtype, place of an output or name of a leaf)
    allowed: Mapping[tuple[str, torch.dtype, int | str], int] = MappingProxyType({})
    interpreted: Mapping[str, tuple[torch.dtype, ...]] = MappingProxyType({})  # dtypes of what takes Triton long there
    plainest: Mapping[str, tuple[int, torch.dtype]] = MappingProxyType({})  # backend: its case and dtype

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(ops, self.op)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        names = set(metafunc.fixturenames)
        if "dtype" in names:
            runs = [(case, dtype, False) for case in self.cases for dtype in case.dtypes]
            runs += [(self.cases[0], dtype, True) for dtype in self.cases[0].dtypes]
            ids = [f"{c.name}-{str(d)[6:]}{'-strided' * s}" for c, d, s in runs]
            metafunc.parametrize("case, dtype, strided", runs, ids=ids)
        if "mistake" in names:
            metafunc.parametrize("mistake", self.mistakes, ids=[m.match for m in self.mistakes])

    def assert_right(self, case: Case, inputs: dict[str, Any], dtype: torch.dtype, backend: str) -> Results:
        """Outputs and gradients of the forced backend, held against the 2x rule; without a backward its outputs."""
        with torch.set_grad_enabled(backends.table(backend)[self.op].backward is not None):
            outputs, grads, douts = run(self.function, case, inputs)
            with backends.force("reference"):
                same_outputs, same_grads, _ = run(self.function, case, inputs)
                exact = {n: v.double() if _is_float(v) else v for n, v in inputs.items()}
                true_outputs, true_grads, _ = run(self.function, case, exact, douts)
        for i, triple in enumerate(zip(outputs, same_outputs, true_outputs, strict=True)):
            further = self.further + self.allowed.get((backend, dtype, i), 0)
            assert_2x(f"output {i}", case.ulps, *triple, further)
        for name, grad in grads.items():
            assert grad.dtype == inputs[name].dtype
            further = self.further + self.allowed.get((backend, dtype, name), 0)
            assert_2x(f"gradient of {name}", case.ulps, grad.contiguous(), same_grads[name], true_grads[name], further)
        return outputs, grads, douts

    def test_values(self, case: Case, dtype: torch.dtype, strided: bool, backend: str) -> None:
        if backend == "triton" and triton.interpreting():
            self.skip_what_is_slow(case, dtype, strided)
        inputs = case.inputs(dtype, strided)
        before = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        with poisoned():
            self.assert_right(case, inputs, dtype, backend)
        for name, value in before.items():
            torch.testing.assert_close(inputs[name], value, rtol=0, atol=0, equal_nan=True, msg=f"{name} was changed")

    def skip_what_is_slow(self, case: Case, dtype: torch.dtype, strided: bool) -> None:
        """Triton's interpreter: every case in fp32 and one narrow dtype, the first one in all, with strides in fp32;
        those of `interpreted` as it says."""
        dtypes = self.interpreted.get(case.name, case.dtypes)
        again = dtype == FP16 and BF16 in dtypes and case.name not in (self.cases[0].name, *self.interpreted)
        if dtype not in dtypes or again or (strided and dtype != FP32):
            pytest.skip(f"{case.name} takes Triton's interpreter too long in {dtype}")

    def test_the_plainest_case_is_served(self, backend: str) -> None:
        if backend not in EVERYWHERE:
            pytest.skip(f"{backend} may be without its hardware here")
        case, dtype = self.plainest.get(backend, (0, FP32))
        inputs = self.cases[case].inputs(dtype)
        try:
            self.function(**inputs)
        except backends.BackendRefused as refusal:
            pytest.fail(str(refusal))

    def test_same_bits_again_with_threads(self, backend: str) -> None:
        """Three threads, whatever the machine has: no race, no sum whose order depends on who came first."""
        if backend == "triton" and triton.interpreting():
            pytest.skip("Triton's interpreter runs in one thread, program after program")
        case, threads = max(self.cases, key=lambda c: _elements(c.inputs(FP32))), torch.get_num_threads()
        inputs = case.inputs(FP32)
        torch.set_num_threads(3)
        try:
            outputs, grads, douts = self.assert_right(case, inputs, FP32, backend)
            for _ in range(3):
                again, more, _ = run(self.function, case, inputs, douts)
                assert all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True))
                assert all(torch.equal(more[name], grads[name]) for name in grads)
        finally:
            torch.set_num_threads(threads)

    def test_default_dtype_does_not_matter(self, backend: str) -> None:
        case, before = self.cases[0], torch.get_default_dtype()
        inputs = case.inputs(FP32)
        want = run(self.function, case, inputs)
        torch.set_default_dtype(FP64)
        try:
            got = run(self.function, case, inputs, want[2])
        finally:
            torch.set_default_dtype(before)
        for a, b in zip((*got[0], *got[1].values()), (*want[0], *want[1].values()), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)

    def test_inference_mode_gives_the_same_bits(self, backend: str) -> None:
        inputs = self.cases[0].inputs(BF16)
        want = as_tuple(self.function(**inputs))
        with torch.inference_mode():
            got = as_tuple(self.function(**inputs))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    def test_opcheck(self, backend: str) -> None:
        """Schema (no mutation, no alias), fake against real (strides too), autograd, and AOT with dynamic shapes."""
        case = self.cases[0]
        for strided in (False, True):
            with Recorder() as recorder:
                run(self.function, case, case.inputs(FP32, strided))
            for function, args in recorder.calls:
                follows = not str(function).removesuffix(".default").endswith("_bwd") and bool(
                    case.leaves(case.inputs(FP32))
                )
                given = [a.detach().requires_grad_(follows) if _is_float(a) else a for a in args]
                checks = ["test_schema", "test_faketensor"]
                if follows and backend == "reference":  # registration and tracing see no backend
                    checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
                torch.library.opcheck(function, tuple(given), test_utils=checks)

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_compile(self, dynamic: bool) -> None:
        case = self.cases[0]
        inputs = case.inputs(FP32)
        torch.compiler.reset()
        compiled = torch.compile(self.function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        outputs, grads, _ = run(compiled, case, inputs)
        want_outputs, want_grads, _ = run(self.function, case, inputs)
        assert all(torch.equal(a, b) for a, b in zip(outputs, want_outputs, strict=True))
        assert all(torch.equal(grads[name], want_grads[name]) for name in want_grads)

    def test_no_value_is_looked_at(self) -> None:
        """Forward and backward of every case on meta tensors, where a look raises: as it would stop a CUDA graph."""
        for case in self.cases:
            made = case.inputs(FP32)
            there = {id(x): x.to("meta") for x in made.values() if isinstance(x, Tensor)}
            inputs = {name: there.get(id(value), value) for name, value in made.items()}
            outputs, grads, _ = run(self.function, case, inputs)
            assert {x.device.type for x in (*outputs, *grads.values())} == {"meta"}, case.name

    def test_mistake(self, mistake: Mistake, backend: str) -> None:
        inputs = self.cases[0].inputs(FP32)
        self.function(**inputs)
        with pytest.raises(ValueError, match=rf"^{mistake.match}.*, got .+"):
            self.function(**mistake.applied(inputs))


class DifferentiableOpSuite(OpSuite):
    """For an op with a backward."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        if "smooth_case" in metafunc.fixturenames:
            smooth = [c for c in self.cases if c.smooth and _elements(c.leaves(c.inputs(FP64)))]
            metafunc.parametrize("smooth_case", smooth, ids=[c.name for c in smooth])

    def test_gradcheck(self, smooth_case: Case) -> None:
        inputs = smooth_case.inputs(FP64)
        leaves = {name: value.requires_grad_() for name, value in smooth_case.leaves(inputs).items()}

        def followed(*values: Tensor) -> tuple[Tensor, ...]:
            outputs = as_tuple(self.function(**(inputs | dict(zip(leaves, values, strict=True)))))
            return tuple(o for o in outputs if o.requires_grad)

        large = _elements(leaves) > GRADCHECK_ELEMENTS
        assert torch.autograd.gradcheck(followed, tuple(leaves.values()), fast_mode=large)

    def test_one_argument_may_ask_for_its_gradient_alone(self, backend: str) -> None:
        case = self.cases[0]
        inputs = case.inputs(FP32)
        _, grads, douts = run(self.function, case, inputs)
        for name, want in grads.items():
            leaf = inputs[name].detach().requires_grad_()
            outputs = [o for o in as_tuple(self.function(**(inputs | {name: leaf}))) if o.requires_grad]
            assert torch.equal(torch.autograd.grad(outputs, leaf, [d.to(FP32) for d in douts])[0], want)

    def test_under_activation_checkpointing(self, backend: str) -> None:
        """Where each saved tensor may be asked for once."""
        case = self.cases[0]
        inputs = case.inputs(FP32)
        want = run(self.function, case, inputs)
        got = run(functools.partial(checkpoint, self.function, use_reentrant=False), case, inputs, want[2])
        for a, b in zip((*got[0], *got[1].values()), (*want[0], *want[1].values()), strict=True):
            assert torch.equal(a, b)

    def test_a_second_derivative_is_refused(self, backend: str) -> None:
        case = self.cases[0]
        inputs = case.inputs(FP32)
        leaves = {name: value.requires_grad_() for name, value in case.leaves(inputs).items()}
        outputs = [o for o in as_tuple(self.function(**inputs)) if o.requires_grad]
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents(outputs), create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{self.op} has no second derivative"):
            sum(g.double().sum() for g in grads if g.requires_grad).backward()


class ConstantOpSuite(OpSuite):
    """For an op without a gradient: every floating-point argument of its cases is `constant`."""

    def test_results_require_no_gradient(self, backend: str) -> None:
        inputs = self.cases[0].inputs(FP32)
        asked = {n: v.requires_grad_() for n, v in inputs.items() if _is_float(v)}
        assert asked and not any(result.requires_grad for result in as_tuple(self.function(**inputs)))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _elements(inputs: dict[str, Any]) -> int:
    return sum(value.numel() for value in inputs.values() if isinstance(value, Tensor))


def spans(*pairs: tuple[int, ...]) -> Tensor:
    """int32 rows of (start, len, ...)."""
    return torch.tensor(pairs, dtype=torch.int32).reshape(len(pairs), -1 if pairs else 2)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=FP64)

"""One op: every backend that serves it and every peer, in one process, in turns."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Peer, Size
from bench.timing import Timing, alternate
from uvg_engine import backends

OPS = tuple(sorted(path.stem for path in (Path(__file__).parent / "ops").glob("*.py") if path.stem != "__init__"))
SLACK = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest value: a wrong kernel is far outside
PASSES = ("forward", "forward+backward")

Line = dict[str, Any]


def bench_op(op: str, size: Size, dtype: torch.dtype, seconds: float, roof: dict[str, float], **how: Any) -> list[Line]:
    """One line per pass and backend or peer. Refusals and wrong results are lines too, and have no time.

    how: device ("cpu" or "cuda") and min_rounds, as in `timing.alternate`.
    """
    case: Case = importlib.import_module(f"bench.ops.{op}").CASE
    device = how.get("device", "cpu")
    inputs = tuple(_moved(value, device) for value in case.make(size, dtype))
    lines = []
    for what in PASSES:
        if what == "forward" or any(_wants_gradient(value) for value in inputs):
            head = {"op": op, "shape": case.shape(size), "dtype": str(dtype)[6:], "pass": what}
            for line in _bench_pass(case, op, size, dtype, inputs, what, seconds, how):
                if what == "forward" and "ms" in line:
                    line |= _rates(case.work(size, dtype.itemsize), line["ms"] / 1e3, roof)
                lines.append(head | line)
    return lines


def _bench_pass(
    case: Case, op: str, size: Size, dtype: torch.dtype, inputs: tuple[Any, ...], what: str, seconds: float, how: Line
) -> Iterator[Line]:
    contenders: dict[str, Callable[[], Any]] = {}
    served = [name for name in reversed(backends.names()) if op in backends.table(name)]
    truth: tuple[Tensor, ...] = ()
    for name in served:
        call = _under(name, _pass(case.call, inputs, what))
        try:
            got = _tensors(call())  # outputs, or gradients
        except backends.BackendRefused as refusal:
            yield {"by": name, "refused": str(refusal)}
            continue
        truth = truth or got  # the reference comes first, and refuses nothing
        wrong = _difference(got, truth, SLACK[dtype], case.agree)
        if wrong:
            yield {"by": name, "wrong": wrong}
            continue
        contenders[name] = call
    first = _tensors(_under("reference", _pass(case.call, inputs, "forward"))())[:1]
    for name, make in case.peers.items():
        peer: Peer = make(size, *inputs)
        result = peer.restore(_pass(peer.function, peer.inputs, "forward")())
        wrong = "" if case.draws else _difference((result,), first, 2 * SLACK[dtype], case.agree)
        if wrong:
            yield {"by": name, "wrong": wrong}
            continue
        contenders[name] = _pass(peer.function, peer.inputs, what)
    yield from compared(alternate(contenders, seconds, **how), set(case.peers))


def compared(timings: dict[str, Timing], peers: set[str]) -> Iterator[Line]:
    """Lines of what was timed together; ours carry how many times faster than each peer and the reference they are."""
    for name, timing in timings.items():
        line: Line = {"by": name, "ms": timing.median * 1e3, "spread": timing.spread, "rounds": len(timing.rounds)}
        others = [] if name in peers else [other for other in timings if other in peers or other == "reference"]
        yield line | {"times_faster": {o: timing.times_faster_than(timings[o]) for o in others if o != name}}


def _pass(function: Callable[..., Any], inputs: tuple[Any, ...], what: str) -> Callable[[], Any]:
    """A call without arguments: the forward alone, or with the gradients of all inputs that want one."""
    if what == "forward":
        return torch.inference_mode()(lambda: function(*inputs))
    leaves = [value for value in inputs if _wants_gradient(value)]
    gradients: list[Tensor] = []

    def both() -> Any:
        outs = [out for out in _tensors(function(*inputs)) if out.requires_grad]
        if not gradients:
            gen = torch.Generator(outs[0].device).manual_seed(0)
            gradients.extend(torch.randn(o.shape, generator=gen, device=o.device).to(o.dtype) for o in outs)
        return torch.autograd.grad(outs, leaves, gradients)

    return both


def _under(backend: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def forced() -> Any:
        with backends.force(backend):
            return call()

    return forced


def _moved(value: Any, device: str) -> Any:
    return value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _difference(got: tuple[Tensor, ...], truth: tuple[Tensor, ...], slack: float, agree: float) -> str:
    """How a result differs from the reference's, or nothing: floats within `slack` of the largest value, no NaN."""
    for place, (a, b) in enumerate(zip(got, truth, strict=True)):
        if a.shape != b.shape:
            return f"output {place} has shape {tuple(a.shape)}, not {tuple(b.shape)}: not timed"
        if not a.is_floating_point():
            share = float((a == b).float().mean())
            if share < agree:
                return f"output {place} equals the reference in {share:.1%} only: not timed"
            continue
        finite = b.isfinite()
        worst = float((a[finite].float() - b[finite].float()).abs().max())
        if not worst <= slack * float(b[finite].float().abs().max()):
            return f"output {place} differs from the reference by {worst:.3g}: not timed"
    return ""


def _rates(work: tuple[float, float], seconds: float, roof: dict[str, float]) -> Line:
    """GFLOP/s and GB/s of the op's own work, and the share of whichever of the two roofs is nearer."""
    reached = {"gflops": work[0] / seconds / 1e9, "gbs": work[1] / seconds / 1e9}
    return reached | {"of_roof": max(reached[rate] / roof[rate] for rate in reached)}

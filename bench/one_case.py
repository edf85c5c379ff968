"""One case at one size: every backend that serves it and every peer, checked, then timed in one process, in turns."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import BACKWARD, BOTH, FORWARD, PASSES, SIZES, Case, Peer, Size
from bench.memory import alone, extra_memory
from bench.peers import PEERS
from bench.timing import Clock, Roof, Timing, within
from uvg_engine import backends

OPS = tuple(sorted(path.stem for path in (Path(__file__).parent / "ops").glob("*.py") if path.stem != "__init__"))
NAMES = (*OPS, "block")
SLACK = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest value: a wrong kernel is far outside
SLOWEST = 20.0  # times the quickest: what is slower is told, and left out of the turns

Line = dict[str, Any]
Call = Callable[[], Any]


def cases(name: str) -> tuple[Case, ...]:
    """The table of cases: what is timed under a name out of NAMES."""
    return importlib.import_module(f"bench.ops.{name}" if name in OPS else f"bench.{name}").CASES


@dataclass(frozen=True)
class Options:
    """only: contenders by name (none: all); one of the others may have to tell the truth, untimed. left_out: contenders
    too. passes: of the case's passes these alone. memory: measure the peak as well, on the CPU. peer_lasts: seconds
    until a peer is compiled and was called once (None: as many as it likes)."""

    only: tuple[str, ...] = ()
    passes: tuple[str, ...] = PASSES
    memory: bool = False
    left_out: tuple[str, ...] = ()
    peer_lasts: float | None = None


def bench_case(
    name: str, case: Case, size_name: str, dtype: torch.dtype, roof: Roof, options: Options
) -> Iterator[Line]:
    """One line per pass and contender; what is missing, refused, wrong or far too slow is one too, without a time."""
    size = SIZES[size_name]
    inputs = tuple(_moved(value, roof.clock.device) for value in case.make(size, dtype))
    for what in case.passes:
        if what in options.passes and (what == FORWARD or any(_wants_gradient(value) for value in inputs)):
            head = {"op": name, "case": case.name, "shape": case.shape(size), "dtype": str(dtype)[6:], "pass": what}
            for line in Pass(name, case, size, dtype, inputs, what, roof, options).lines():
                if options.memory and "ms" in line:
                    place = cases(name).index(case)
                    given = (name, place, size_name, str(dtype)[6:], what, line["backend"], torch.get_num_threads())
                    line["extra_mb"] = alone("bench.one_case", "memory_of", *given)
                yield head | line


def memory_of(name: str, place: int, size: str, dtype: str, what: str, contender: str, threads: int) -> float:
    """MB that a contender of the place-th case of a name needs, in this process."""
    torch.set_num_threads(threads)
    case, kind = cases(name)[place], getattr(torch, dtype)
    run = Pass(name, case, SIZES[size], kind, case.make(SIZES[size], kind), what, Roof(Clock()), Options())
    return extra_memory(run.contender(contender).call)


@dataclass(frozen=True)
class Contender:
    """call: what is timed. first: the forward's first output, computed anew."""

    ours: bool
    call: Call
    first: Callable[[], Tensor]


@dataclass
class Pass:
    """One pass of a case, everyone in it."""

    name: str
    case: Case
    size: Size
    dtype: torch.dtype
    inputs: tuple[Any, ...]
    what: str
    roof: Roof
    options: Options

    def lines(self) -> Iterator[Line]:
        truth_name = self.case.truth(self.size, self.roof.clock.device)
        if truth_name in PEERS and PEERS[truth_name].missing(self.roof.clock.device):
            truth_name = "reference"
        truth = self.contender(truth_name)
        first, full = truth.first(), _tensors(truth.call()) if truth.ours else ()
        fit: dict[str, Contender] = {}
        for name in (truth_name, *(each for each in self.names() if each != truth_name)):
            if self.options.only and name not in self.options.only:
                continue
            if name in PEERS and (reason := PEERS[name].missing(self.roof.clock.device)):
                yield {"backend": name, "missing": reason}
                continue
            try:
                with within(self.options.peer_lasts if name in PEERS else None):
                    contender = truth if name == truth_name else self.contender(name)
                    wrong = self.wrong(contender, first, full if truth.ours else ())
                    if name in PEERS:
                        contender.call()  # a compiler's backward is made by its first call
            except backends.BackendRefused as refusal:
                yield {"backend": name, "refused": str(refusal)}
                continue
            except Exception as error:  # of a peer: this dtype, this shape or this chip is not its own
                if name not in PEERS:
                    raise
                yield {"backend": name, "missing": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
                continue
            if wrong:
                yield {"backend": name, "wrong": wrong}
            else:
                fit[name] = contender
        yield from self.timed(fit)

    def names(self) -> tuple[str, ...]:
        """Backends, the reference first, then peers."""
        if self.case.whole:
            ours: tuple[str, ...] = ("reference", "uvg")
        else:
            ours = tuple(name for name in reversed(backends.names()) if self.name in backends.table(name))
        peers = (*self.case.peers, *self.case.compiled_by)
        able = (peer for peer in peers if self.what in PEERS[peer].passes and peer not in self.options.left_out)
        return (*ours, *able)

    def contender(self, name: str) -> Contender:
        if name in PEERS:
            peers = self.case.peers
            make = peers.get(name) or next(iter(peers.values()))
            peer: Peer = make(self.size, *self.inputs)
            adapt = PEERS[name].adapt
            peer = adapt(peer, self.what) if adapt else peer
            forward = _pass(peer.function, peer.inputs, (), FORWARD)
            return Contender(
                False,
                _pass(peer.function, peer.inputs, peer.parameters, self.what),
                lambda: peer.restore(forward()),
            )
        call, forward = (_pass(self.case.call, self.inputs, (), what) for what in (self.what, FORWARD))
        if name != "uvg":
            call, forward = _under(name, call), _under(name, forward)
        return Contender(True, call, lambda: _tensors(forward())[0])

    def wrong(self, contender: Contender, first: Tensor, full: tuple[Tensor, ...]) -> str:
        """How the result differs from the truth, or nothing: all outputs or gradients of ours, the first of a peer."""
        slack = SLACK[self.dtype] if self.case.slack is None else self.case.slack
        if contender.ours and full:
            return difference(_tensors(contender.call()), full, slack, self.case.agree)
        got = contender.first()
        return "" if self.case.draws else difference((got,), (first,), 2 * slack, self.case.agree)

    def timed(self, fit: dict[str, Contender]) -> Iterator[Line]:
        once = {name: min(self.roof.clock.once(each.call) for _ in range(2)) for name, each in fit.items()}
        quick = min(once.values(), default=0.0)
        for name, seconds in once.items():
            if seconds > max(SLOWEST * quick, 0.1):
                yield {"backend": name, "slow": f"{seconds * 1e3:.0f} ms, {seconds / quick:.0f} times the quickest"}
                del fit[name]
        if not fit:
            return
        reach = self.roof.of(self.dtype)
        timings = self.roof.clock.alternate({name: contender.call for name, contender in fit.items()})
        peers = {name for name in fit if not fit[name].ours}
        for line in compared(timings, peers):
            yield line | rates(self.work(), line["ms"] / 1e3, reach)

    def work(self) -> tuple[float, float]:
        """(flops, bytes) of the pass."""
        forward = self.case.work(self.size, self.dtype.itemsize)
        share = {FORWARD: (1.0, 0.0), BACKWARD: (0.0, 1.0), BOTH: (1.0, 1.0)}[self.what]
        flops, moved = (w * (share[0] + share[1] * back) for w, back in zip(forward, self.case.backward, strict=True))
        return flops, moved


def compared(timings: dict[str, Timing], peers: set[str]) -> Iterator[Line]:
    """Lines of what was timed together; ours carry how many times faster than each peer and the reference they are."""
    for name, timing in timings.items():
        line: Line = {"backend": name, "ms": timing.median * 1e3, "least_ms": min(timing.rounds) * 1e3}
        line |= {"spread": timing.spread, "rounds": len(timing.rounds)}
        others = [] if name in peers else [other for other in timings if other in peers or other == "reference"]
        yield line | {"times_faster": {o: timing.times_faster_than(timings[o]) for o in others if o != name}}


def rates(work: tuple[float, float], seconds: float, roof: dict[str, float]) -> Line:
    """GFLOP/s and GB/s of the op's own work, both roofs, and the share of whichever of the two is nearer."""
    reached = {"gflops": work[0] / seconds / 1e9, "gbs": work[1] / seconds / 1e9}
    share = max(reached[rate] / roof[rate] for rate in reached)
    return reached | {"of_roof": share, "roof": roof}


def _pass(function: Callable[..., Any], inputs: tuple[Any, ...], parameters: tuple[Tensor, ...], what: str) -> Call:
    """A call without arguments: the forward alone, the gradients alone, or both; of all inputs that want a gradient."""
    if what == FORWARD:
        return torch.inference_mode()(lambda: function(*inputs))
    leaves = [value for value in (*inputs, *parameters) if _wants_gradient(value)]
    gradients: list[Tensor] = []
    kept: list[Tensor] = []

    def forward() -> list[Tensor]:
        outs = [out for out in _tensors(function(*inputs)) if out.requires_grad]
        if not gradients:
            gen = torch.Generator(outs[0].device).manual_seed(0)
            gradients.extend(torch.randn(o.shape, generator=gen, device=o.device).to(o.dtype) for o in outs)
        return outs

    def backward() -> Any:
        if not kept:
            kept.extend(forward())
        return torch.autograd.grad(kept, leaves, gradients, retain_graph=True, allow_unused=True)

    return (
        backward if what == BACKWARD else lambda: torch.autograd.grad(forward(), leaves, gradients, allow_unused=True)
    )


def _under(backend: str, call: Call) -> Call:
    def forced() -> Any:
        with backends.force(backend):
            return call()

    return forced


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, nn.Parameter):
        return value  # moves with its module
    if isinstance(value, nn.Module):
        return value.to(device)
    return value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def difference(got: tuple[Tensor, ...], truth: tuple[Tensor, ...], slack: float, agree: float) -> str:
    """How a result differs from the truth, or nothing: floats within `slack` of the largest finite value, the same
    infinities, no NaN."""
    for place, (a, b) in enumerate(zip(got, truth, strict=True)):
        if a is None or b is None:
            if a is not b:
                return f"output {place} is there in one of the two only: not timed"
            continue
        if a.shape != b.shape:
            return f"output {place} has shape {tuple(a.shape)}, not {tuple(b.shape)}: not timed"
        if not a.is_floating_point():
            share = float((a == b).float().mean())
            if share < agree:
                return f"output {place} equals the reference in {share:.1%} only: not timed"
            continue
        finite = b.isfinite()
        if not torch.equal(a[~finite].float(), b[~finite].float()):
            return f"output {place} differs from the reference where that is infinite: not timed"
        if not finite.any():
            continue
        worst = float((a[finite].float() - b[finite].float()).abs().max())
        if not worst <= slack * float(b[finite].float().abs().max()):
            return f"output {place} differs from the reference by {worst:.3g}: not timed"
    return ""

"""Which variants of the Triton kernels bench/gpu_check.sh compiles on an H100, and what that takes: without a GPU.

The tests marked gpu run on the CPU as if it were one: each call of a host function goes as far as Triton's own key of
what it compiles, and the test goes on with the reference's results. Those that need more of a device (a graph replayed,
Philox drawn there) fail here, after all that they launch. The timings' launches are made likewise, without results.
`--compile` then compiles all of it, or a sample, for sm_90.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import random
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any
from unittest import mock

import pytest
import torch
from _pytest.mark.expression import Expression

from bench import aot, gpu_check
from bench.case import FORWARD, SIZES
from bench.one_case import _pass, _wants_gradient, cases
from uvg_engine import backends
from uvg_engine.backends import triton as backend

TARGET, SMS = (9, 0), 132  # an H100: its capability, its multiprocessors


class Recorder:
    """A plugin of pytest. variants: Triton's description of what it would compile, to who asks for it."""

    def __init__(self) -> None:
        self.variants: dict[str, set[str]] = collections.defaultdict(set)
        self.ran, self.failed, self.at = 0, 0, ""

    def note(self, *, compile: dict[str, Any], **more: Any) -> bool:
        """Triton's `jit_cache_hook`."""
        self.variants[compile["specialization_data"]].add(self.at)
        return True  # nothing is compiled

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Iterator[None]:
        """As where there is a GPU."""
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            return (yield)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Those on a GPU that concern Triton; from here on the CPU is the device."""
        items[:] = [item for item in items if item.get_closest_marker("gpu") and "triton" in item.nodeid]
        for module in {sys.modules["gpu_device"], *(item.module for item in items)}:
            if getattr(module, "DEVICE", None) == "cuda":
                module.DEVICE = "cpu"

    def pytest_runtest_setup(self, item: Any) -> None:
        self.at = item.nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.ran += report.when == "call"
        self.failed += report.failed


class _Graph:
    """Stands in for a CUDA graph."""

    def replay(self) -> None:
        pass


@contextlib.contextmanager
def as_on_a_gpu(note: Callable[..., bool], truth: bool = True) -> Iterator[None]:
    """CPU tensors are served by the triton backend as on an H100, as far as `note`. truth: results are the reference's,
    else memory as it is. Copies to the device are copies."""
    import triton
    from triton.runtime import driver

    from uvg_engine.kernels import _launch

    table, refuses, to = backends.table("triton"), backend.refuses, torch.Tensor.to

    def refuses_here(*tensors: Any) -> str | None:
        with mock.patch.object(backend, "interpreting", lambda: True):
            return refuses(*tensors)

    def copied(x: Any, *args: Any, **more: Any) -> Any:
        return to(x, *args, **(more | {"copy": True} if args[:1] == ("cpu",) else more))

    def noted(op: str, part: str) -> Any:
        ours, theirs = (getattr(backends.table(name)[op], part) for name in ("triton", "reference"))

        def call(*args: Any) -> Any:
            result = ours(*args)
            return theirs(*args) if truth else result

        return None if ours is None else call

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.dict(os.environ, UVG_TEST_DEVICE="cuda"))
        enter(mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note))
        enter(mock.patch.object(backend, "refuses", refuses_here))
        enter(mock.patch.object(_launch, "_multiprocessors", lambda device: SMS))
        enter(mock.patch.object(torch.cuda, "get_device_capability", lambda *device: TARGET))
        enter(mock.patch.object(torch.cuda, "CUDAGraph", _Graph))
        enter(mock.patch.object(torch.cuda, "graph", lambda graph: contextlib.nullcontext()))
        enter(mock.patch.object(torch.Tensor, "to", copied))
        for op, kernel in list(table.items()):
            ours = dataclasses.replace(kernel, forward=noted(op, "forward"), backward=noted(op, "backward"))
            enter(mock.patch.dict(table, {op: ours}))
        enter(_launch.configured_for(TARGET))
        driver.set_active(aot._Driver(TARGET))  # stays: Triton has no other without a GPU
        yield


def of_tests(*which: str) -> Recorder:
    """What the tests marked gpu ask for. which: as pytest takes it."""
    recorder = Recorder()
    with as_on_a_gpu(recorder.note):
        pytest.main(["-q", "-q", "--tb=no", "--disable-warnings", "-p", "no:cacheprovider", *which], plugins=[recorder])
    return recorder


def of_timings(recorder: Recorder) -> None:
    """What the timings ask for, but for the block, which is made of the same ops."""
    size = SIZES[gpu_check.SIZE]
    with as_on_a_gpu(recorder.note, truth=False):
        for op in (op for op in gpu_check.timed() if op in backends.table("triton")):
            recorder.at = f"bench {op}"
            for case in cases(op):
                inputs = case.make(size, torch.bfloat16)
                for what in case.passes:
                    if what == FORWARD or any(map(_wants_gradient, inputs)):
                        with backends.force("triton"):
                            _pass(case.call, inputs, (), what)()


def shards_of(test: str) -> list[str]:
    """Those of gpu_check that a test is in; a timing is its own."""
    file = test.split("::")[0]
    names = [n for n, (which, files) in _shards().items() if file in files and which.evaluate(lambda p, **_: p in test)]
    return names or [test]


@functools.cache
def _shards() -> dict[str, tuple[Expression, list[str]]]:
    return {name: (Expression.compile(which), files) for name, (_, which, *files) in gpu_check.shards().items()}


@dataclass(frozen=True)
class Compiled:
    """seconds: of a core, from the source to the machine code. stack: bytes of a thread that were spilled."""

    variant: str
    seconds: float
    stack: int = 0
    shared: int = 0
    error: str = ""


def compile_variant(variant: str) -> Compiled:
    """One of them, in an empty cache."""
    from triton.runtime import driver

    module, _, name = json.loads(variant)["name"].rpartition(".")
    driver.set_active(aot._Driver(TARGET))
    kernel = getattr(importlib.import_module(module), name)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        begun = _cpu_seconds()
        try:
            binary = kernel.preload(variant)
        except Exception as error:  # of a compiler: told
            return Compiled(variant, _cpu_seconds() - begun, error=f"{type(error).__name__}: {str(error)[:300]}")
        seconds = _cpu_seconds() - begun
    return Compiled(variant, seconds, aot._resources(binary.asm["cubin"])[1], binary.metadata.shared)


def _cpu_seconds() -> float:
    told = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in told)


def name_of(variant: str) -> str:
    """The kernel's."""
    return json.loads(variant)["name"].rpartition(".")[2]


def compile_some(variants: Iterable[str], count: int, workers: int) -> list[Compiled]:
    """`count` of them drawn at random, the same in every run; those of the package alone."""
    ours = sorted(v for v in variants if json.loads(v)["name"].startswith("uvg_engine."))
    random.Random(0).shuffle(ours)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_variant, ours[:count]))


def report(recorder: Recorder, compiled: Sequence[Compiled] = ()) -> Iterator[str]:
    """Lines: counts by kernel, file and shard, their seconds where some are known, the compiler's complaints."""
    variants = recorder.variants
    yield f"{len(variants)} variants; {recorder.ran} tests ran, {recorder.failed} failed for want of a device"
    means: dict[str, float] = {}
    if compiled:
        seconds = [each.seconds for each in compiled]
        by_kernel = collections.defaultdict(list)
        for each in compiled:
            by_kernel[name_of(each.variant)].append(each.seconds)
        means = {name: statistics.mean(values) for name, values in by_kernel.items()}
        mean = statistics.mean(seconds)
        means = {name: means.get(name, mean) for name in {name_of(v) for v in variants}}
        total = sum(means[name_of(v)] for v in variants)
        yield f"{len(compiled)} compiled: median {statistics.median(seconds):.2f} s, all {total:.0f} s of one core"
    parts = {
        "kernel": {v: {name_of(v)} for v in variants},
        "file": {v: {test.split("::")[0] for test in tests} for v, tests in variants.items()},
        "shard": {v: {shard for test in tests for shard in shards_of(test)} for v, tests in variants.items()},
    }
    for title, places in parts.items():
        counts = collections.Counter(place for found in places.values() for place in found)
        yield f"\n{title}: variants" + ", seconds of one core" * bool(means)
        for place, count in counts.most_common():
            lasts = sum(means.get(name_of(v), 0.0) for v, found in places.items() if place in found)
            yield f"  {place}: {count}" + f", {lasts:.0f}" * bool(means)
    for each in compiled:
        told = [each.error] * bool(each.error) + [f"{each.stack} bytes spilled"] * bool(each.stack)
        told += [f"{each.shared} bytes of shared memory"] * (each.shared > aot.SHARED_LIMIT[TARGET])
        if told:
            yield f"{name_of(each.variant)}: {', '.join(told)} ({min(variants[each.variant])})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; returns 1 where something does not compile or fit."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_variants", description=__doc__)
    parser.add_argument("--compile", type=int, default=0, metavar="COUNT", help="so many of them, drawn at random")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("which", nargs="*", default=["tests/ops"], help="as pytest takes it, its options behind --")
    args = parser.parse_args(arguments)
    recorder = of_tests(*args.which)
    of_timings(recorder)
    compiled = compile_some(recorder.variants, args.compile, args.workers) if args.compile else []
    print("\n".join(report(recorder, compiled)))
    return int(any(each.error or each.shared > aot.SHARED_LIMIT[TARGET] for each in compiled))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())

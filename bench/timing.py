"""Timing in turns: every round calls each contender once, so that a noisy machine is as noisy for all of them."""

from __future__ import annotations

import contextlib
import datetime
import functools
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from uvg_engine.backends import gpu_limits

MIN_SAMPLE = 2e-3  # seconds: quicker calls are repeated until a sample lasts this long
# On a GPU few: all calls of a sample wait in the device's queue, and the host with them where that is full (at some
# thousand launches, it is told; not measured). Three of them a call are the clock's own.
MOST_REPEATS = {"cpu": 1000, "cuda": 50}
MIN_ROUNDS, MAX_ROUNDS = 5, 1000
PACKAGES = ("openvino", "diffusers", "triton", "liger_kernel", "flash_attn")


def positive(text: str) -> int:
    """A count on the command line, for argparse."""
    if int(text) < 1:
        raise ValueError(f"a count must be positive, got {text}")
    return int(text)


def duration(text: str) -> float:
    """Seconds on the command line, for argparse."""
    if not 0 <= float(text) < math.inf:
        raise ValueError(f"seconds must be finite and not negative, got {text}")
    return float(text)


class _Late(BaseException):
    """Passes through those who catch every Exception, as compilers do."""


@contextlib.contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """TimeoutError where the block takes longer (None: as long as it likes). For the main thread, on Unix."""
    if seconds is None:
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise _Late

    before, begun = signal.signal(signal.SIGALRM, ring), time.monotonic()
    rest, again = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again every second: somebody may have caught it
    try:
        yield
    except _Late:
        raise TimeoutError(f"not ready after {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if rest:  # somebody else's timer goes on
            signal.setitimer(signal.ITIMER_REAL, max(rest - (time.monotonic() - begun), 1e-3), again)


@dataclass(frozen=True)
class Timing:
    """Seconds of a call, one per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, over the median."""
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return (high - low) / 2 / self.median

    def times_faster_than(self, other: Timing) -> float:
        """Median of the rounds' own ratios: both were timed within the same moment."""
        return statistics.median(b / a for a, b in zip(self.rounds, other.rounds, strict=True))


@dataclass(frozen=True)
class Clock:
    """How calls are timed. device: "cpu" or "cuda". seconds: for each contender. cpu_time: seconds of this process's
    cores instead of the wall's, which others at work on the machine disturb less; for one thread only. On cuda the
    device's events time each call alone, after its L2 cache was overwritten."""

    device: str = "cpu"
    seconds: float = 1.0
    min_rounds: int = MIN_ROUNDS
    cpu_time: bool = False

    def once(self, call: Callable[[], Any], repeats: int = 1) -> float:
        """Seconds of a call."""
        if self.device == "cuda":
            return _once_on_gpu(call, repeats)
        now = time.process_time if self.cpu_time else time.perf_counter
        start = now()
        for _ in range(repeats):
            call()
        return (now() - start) / repeats

    def alternate(self, contenders: Mapping[str, Callable[[], Any]]) -> dict[str, Timing]:
        """Time the contenders in turns, about `seconds` each; which of them begins changes from round to round."""
        repeats = {name: self._repeats(call) for name, call in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        names, end = list(contenders), time.perf_counter() + self.seconds * len(contenders)
        for number in range(MAX_ROUNDS):
            if number >= self.min_rounds and time.perf_counter() >= end:
                break
            for name in names[number % len(names) :] + names[: number % len(names)]:
                times[name].append(self.once(contenders[name], repeats[name]))
        return {name: Timing(tuple(rounds)) for name, rounds in times.items()}

    def _repeats(self, call: Callable[[], Any]) -> int:
        call()  # warms caches and allocators
        return max(1, min(MOST_REPEATS[self.device], round(MIN_SAMPLE / max(self.once(call), 1e-7))))


# Clocks of the device: a call, some 0.3 ms, in which the host asks for an op and its backward; at least some 5 ms, in
# which it asks for a block and its backward.
AHEAD, LEAST_AHEAD = 500_000, 10_000_000


def _once_on_gpu(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call by the device's own clock; before each the L2 cache is overwritten, as it is in a model. The
    device is made to wait first, so that it finds what it shall do: else a short call is timed by the host's pace."""
    flush = _flush_buffer()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda._sleep(max(AHEAD * repeats, LEAST_AHEAD))
    for begin, end in marks:
        flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in marks) / 1e3 / repeats  # elapsed_time: milliseconds


UNKNOWN_L2 = 128 << 20  # bytes, where cuda-python tells nothing: no GPU known to us has more


@functools.cache
def _flush_buffer() -> torch.Tensor:
    """Twice the L2 cache of the GPU in use."""
    found, _ = gpu_limits.limits()
    l2 = found[torch.cuda.current_device()].l2 if found else UNKNOWN_L2
    return torch.empty(2 * l2, dtype=torch.uint8, device="cuda")


# (M, K, N) of torch's products; on the CPU those of the 1.3B model's experts were no quicker than the cube of 2048
ROOF_PRODUCTS = {"cpu": ((1024, 1024, 1024), (2048, 2048, 2048)), "cuda": ((8192, 8192, 8192),)}
ROOF_COPY = {"cpu": 2**25, "cuda": 2**28}  # floats
ROOF_LASTS = 20.0  # seconds: the machine drifts, so it is measured anew


class Roof:
    """What this machine reaches here and now: GFLOP/s of torch's matrix product, GB/s of a copy; best of a few."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._measured: dict[torch.dtype, tuple[float, dict[str, float]]] = {}

    def of(self, dtype: torch.dtype) -> dict[str, float]:
        """gflops and gbs, not older than ROOF_LASTS seconds."""
        when, reach = self._measured.get(dtype, (0.0, {}))
        if not reach or time.monotonic() - when > ROOF_LASTS:
            reach = self._measure(dtype)
            self._measured[dtype] = (time.monotonic(), reach)
        return reach

    def _measure(self, dtype: torch.dtype) -> dict[str, float]:
        device, gflops = self.clock.device, 0.0
        for m, k, n in ROOF_PRODUCTS[device]:
            a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
            best = min(self.clock.once(lambda a=a, b=b: a @ b.T) for _ in range(4))
            gflops = max(gflops, 2 * m * k * n / best / 1e9)
        source = torch.ones(ROOF_COPY[device], device=device)
        target = torch.empty_like(source)
        copy = min(self.clock.once(lambda: target.copy_(source)) for _ in range(4))
        return {"gflops": gflops, "gbs": 2 * 4 * len(source) / copy / 1e9}


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a number is worth nothing without."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in PACKAGES if find_spec(name)},
        "date": str(datetime.date.today()),
        "commit": _commit(),
        **({"clocks": gpu_limits.clocks(torch.cuda.current_device())} if device == "cuda" else {}),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    told = {name.strip(): value.strip() for name, value in fields.items()}
    name = told.get("model name") or platform.processor() or platform.machine()
    place = f" (family {told['cpu family']} model {told['model']})" if "cpu family" in told else ""
    return f"{name}{place}"


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    if shutil.which("git") is None:
        return "unknown"
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"

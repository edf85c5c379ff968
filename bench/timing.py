"""Timing in turns: every round calls each contender once, so that a noisy machine is as noisy for all of them."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MIN_SAMPLE = 2e-3  # seconds: quicker calls are repeated until a sample lasts this long
MIN_ROUNDS, MAX_ROUNDS = 5, 1000


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


def alternate(
    contenders: Mapping[str, Callable[[], Any]], seconds: float, device: str = "cpu", min_rounds: int = MIN_ROUNDS
) -> dict[str, Timing]:
    """Time the contenders in turns for about `seconds` each; which of them begins changes from round to round."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    repeats = {name: _repeats(call, wait) for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names, end = list(contenders), time.perf_counter() + seconds * len(contenders)
    for number in range(MAX_ROUNDS):
        if number >= min_rounds and time.perf_counter() >= end:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(_time(contenders[name], repeats[name], wait))
    return {name: Timing(tuple(rounds)) for name, rounds in times.items()}


def _repeats(call: Callable[[], Any], wait: Callable[[], Any]) -> int:
    call()  # warms caches and allocators
    return max(1, min(1000, round(MIN_SAMPLE / max(_time(call, 1, wait), 1e-7))))


def _time(call: Callable[[], Any], repeats: int, wait: Callable[[], Any]) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def roof(dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """What this machine reaches here and now: GFLOP/s of torch's matrix product, GB/s of a copy; best of a few."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    side, size = (8192, 2**28) if device == "cuda" else (1024, 2**25)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    product = min(_time(lambda: a @ b, 1, wait) for _ in range(6))
    copy = min(_time(lambda: target.copy_(source), 1, wait) for _ in range(6))
    return {"gflops": 2 * side**3 / product / 1e9, "gbs": 2 * 4 * size / copy / 1e9}


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a number is worth nothing without."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
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
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"

"""Time the ops on every backend that serves them; each backend's result is checked before its time is told."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import CASES, Case
from uvg_engine import backends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLACK = {"fp32": 1e-4, "bf16": 3e-2}  # of the largest value: a wrong kernel is far outside, rounding well inside


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("ops", nargs="*", help=f"out of {', '.join(case.op for case in CASES)}; all if none is named")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="fp32 and bf16 if not given")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each line (default 0.5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    unknown = set(args.ops) - {case.op for case in CASES}
    if unknown:
        parser.error(f"no such op: {', '.join(sorted(unknown))}")
    about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit()}
    if not args.json:
        print("  ".join(f"{key} {value}" for key, value in about.items()))
    wrong = 0
    with torch.inference_mode():
        for case in CASES:
            for name in args.dtype or DTYPES if case.op in args.ops or not args.ops else ():
                for line in bench(case, name, args.seconds):
                    wrong += "wrong" in line
                    print(json.dumps(line | about) if args.json else text(line), flush=True)
    return 1 if wrong else 0


def bench(case: Case, dtype: str, seconds: float) -> list[dict[str, Any]]:
    """One line per backend that serves the case, the reference first."""
    inputs = case.make(DTYPES[dtype])
    lines: list[dict[str, Any]] = []
    truth: tuple[Tensor, ...] = ()
    base = 0.0
    for backend in reversed(backends.names()):
        if case.op not in backends.table(backend):
            continue
        line: dict[str, Any] = {"op": case.op, "shape": case.shape, "dtype": dtype, "backend": backend}
        with backends.force(backend):
            try:
                got = tensors(case.call(*inputs))
            except backends.BackendRefused as refusal:
                lines.append(line | {"refused": str(refusal)})
                continue
            truth = truth or got
            if not close(got, truth, SLACK[dtype]):
                lines.append(line | {"wrong": "differs from the reference: not timed"})
                continue
            median, spread = measure(lambda: case.call(*inputs), seconds)
        base = base or median
        lines.append(line | {"ms": median * 1e3, "spread": spread, "against_reference": base / median})
    return lines


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def close(got: tuple[Tensor, ...], truth: tuple[Tensor, ...], slack: float) -> bool:
    """Equal integers; floats within `slack` of the largest value; no NaN."""
    for a, b in zip(got, truth, strict=True):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return False
        elif not (a.float() - b.float()).abs().max() <= slack * b.float().abs().max():
            return False
    return True


def measure(call: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """(median seconds of a call, half the distance between the quartiles over the median), after two warm-up calls."""
    call(), call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 10_000):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    low, median, high = statistics.quantiles(times, n=4)
    return median, (high - low) / 2 / median


def text(line: dict[str, Any]) -> str:
    head = f"{line['op']:22} {line['shape']:24} {line['dtype']:5} {line['backend']:10}"
    if "ms" not in line:
        return f"{head} {line.get('refused') or line['wrong']}"
    return f"{head} {line['ms']:9.3f} ms  +-{100 * line['spread']:4.1f} %  {line['against_reference']:6.2f} x reference"


def commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())

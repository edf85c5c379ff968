"""`python -m bench --record [PAGE]`: the runs that stand in docs/<PAGE>.md, one after the other.

It writes bench/results/<date>-<machine>[-<page>].jsonl, then the page's table and its pictures (see `bench.report`).
The table of a run that was ended early: `python -m bench.report FILE PAGE`.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROWS = "modulated_layer_norm gated_residual gated_residual_norm qk_norm_rope"
ROUTING = "moe_route moe_dispatch moe_combine"
SMALL = f"linear moe_mlp flash_attention {ROWS} {ROUTING} linear_sample flow_step flow_noise"  # a call shows
ATTENTION = "flash_attention --only cpu --only torch --only openvino"  # the reference would take most of the time
BLOCK = "block --only uvg --only torch --only inductor --only openvino --only diffusers"
RUNS = (  # arguments of `python -m bench`
    f"{ATTENTION} --size 1.3b-2560 --size L1024 --size L2048 --size L4096",
    f"{BLOCK} --size 1.3b-2560 --memory",
    "moe_mlp linear --size 1.3b-2560",
    f"{ROWS} --size 1.3b-2560 --seconds 0.5",
    "linear_sample linear_cross_entropy --size 1.3b-vocab --memory --only cpu --only torch",
    f"{ROUTING} flow_step flow_noise --size 1.3b-2560 --seconds 0.5",
)
FP32_RUNS = (  # beside a record in bf16
    f"{ATTENTION} --size L2048 --pass forward --pass backward",
    f"{BLOCK} --size 1.3b-2560 --pass forward",
)
SMALL_RUN = f"{SMALL} --size digits-1 --seconds 0.3 --only cpu --only torch"  # in fp32, as the embedded model
LONG_RUNS = (
    f"{BLOCK} --size 1.3b-8192 --pass forward",
    f"{ATTENTION} --size L8192 --size L16384 --pass forward",
)
THROUGHPUT = (  # job, model, layers, samples, steps, seconds
    *((job, "digits", 6, 8, 8, 4.0) for job in ("generate", "caption", "joint", "train")),
    *((job, "1.3b", 2, 1, 4, 8.0) for job in ("generate", "joint")),
)


def record(
    run: Callable[[Sequence[str]], Iterator[dict[str, Any]]],
    how: Sequence[str],
    about: dict[str, Any],
    page: str = "benchmarks",
    dtype: str = "bf16",
) -> Path:
    """run: the lines of a command line of `python -m bench`; how: options of all; page: docs/<page>.md is written.
    Returns the file of results."""
    from bench import report, throughput
    from bench.timing import Clock

    RESULTS.mkdir(exist_ok=True)
    name = re.sub(r"\W+", "-", about["device"].lower()).strip("-")
    path = RESULTS / f"{datetime.date.today()}-{name}{page.removeprefix('benchmarks').replace('_', '-')}.jsonl"
    with path.open("w") as file:

        def keep(line: dict[str, Any]) -> None:
            file.write(json.dumps(rounded(line | about)) + "\n")
            file.flush()

        def keep_all(runs: Sequence[str], dtype: str) -> None:
            for arguments in runs:
                for line in run([*arguments.split(), "--dtype", dtype, *how]):
                    keep(line)

        keep_all(RUNS, dtype)
        keep_all((*FP32_RUNS, SMALL_RUN) if dtype != "fp32" else (SMALL_RUN,), "fp32")
        own = throughput.NAMES[dtype] if dtype == "fp32" else None  # or each model's
        for *given, seconds in THROUGHPUT:
            clock = Clock(seconds=seconds, min_rounds=3, cpu_time="--cpu-time" in how)
            for line in throughput.lines(*given, clock, own):
                keep(line)
        keep_all(LONG_RUNS, dtype)
    report.write(path, page)
    return path


def rounded(value: Any) -> Any:
    """Floats to four digits: more are noise, and the file is committed."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value

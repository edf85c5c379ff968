"""`python -m bench --record [PAGE]`: the runs that stand in docs/<PAGE>.md, one after the other.

It writes bench/results/<date>-<machine>[-<page>].jsonl, each run when it is done, then the page's table and pictures
(see `bench.report`). After an early end, `--resume FILE` runs what it lacks: on the same machine and versions, for
the same page and dtype. The table of what is there: `python -m bench.report FILE`.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from uvg_engine.files import replacing

LINE = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
ROWS = "modulated_layer_norm gated_residual gated_residual_norm qk_norm_rope"
ROUTING = "moe_route moe_dispatch moe_combine"
SMALL = f"linear moe_mlp flash_attention {ROWS} {ROUTING} linear_sample flow_step flow_noise"  # a call shows
ATTENTION = "flash_attention --only cpu --only torch --only openvino"  # the reference would take most of the time
BLOCK = "block --only uvg --only torch --only inductor --only openvino --only diffusers"
RUNS = (  # arguments of `python -m bench`
    *(f"{ATTENTION} --size {size}" for size in ("1.3b-2560", "L1024", "L2048", "L4096")),
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
    *(f"{ATTENTION} --size {size} --pass forward" for size in ("L8192", "L16384")),
)
THROUGHPUT = (  # job, model, layers, samples, steps, seconds
    *((job, "digits", 6, 8, 8, 4.0) for job in ("generate", "caption", "joint", "train")),
    *((job, "1.3b", 2, 1, 4, 8.0) for job in ("generate", "joint")),
)


def record(
    run: Callable[[Sequence[str]], Iterator[LINE]],
    told: Callable[[Iterator[LINE]], Iterator[LINE]],
    how: Sequence[str],
    about: LINE,
    page: str = "benchmarks",
    dtype: str = "bf16",
    begun: Path | None = None,
) -> Path:
    """run: the lines of a command line of `python -m bench`; told: the same lines, told; how: options of all; page:
    docs/<page>.md is written; begun: a file of results of this machine that is gone on with. Returns the file of
    results. Stops before the first run where matplotlib is missing, where a record of today would be lost, and where
    `begun` is of another record."""
    from bench import report

    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--record draws pictures with matplotlib: pip install '.[bench]'")
    path = begun or _file(about["device"], page)
    runs = dict(_runs(run, how, dtype))
    done = _begun(path, about, page, runs.keys()) if begun else set()
    if not begun:
        if path.exists() and path.stat().st_size:
            raise SystemExit(f"--record: there is a record of today: go on with --resume {path}, or move it away")
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    for name, measure in runs.items():
        if name not in done:
            found = [json.dumps(rounded({"run": name} | line | about)) + "\n" for line in told(measure())]
            with replacing(path) as temporary:  # a run is in the file whole, whenever it is ended
                temporary.write_text(path.read_text() + "".join(found))
    report.write(path, page)
    return path


def _runs(
    run: Callable[[Sequence[str]], Iterator[LINE]], how: Sequence[str], dtype: str
) -> Iterator[tuple[str, Callable[[], Iterator[LINE]]]]:
    """Every run of a record: its name, and what measures its lines as they are taken."""
    from bench import throughput
    from bench.timing import Clock

    def named(runs: Sequence[str], dtype: str) -> Iterator[tuple[str, Callable[[], Iterator[LINE]]]]:
        for arguments in runs:
            name = f"{arguments} --dtype {dtype}"
            yield name, partial(run, [*name.split(), *how])

    yield from named(RUNS, dtype)
    yield from named((*FP32_RUNS, SMALL_RUN) if dtype != "fp32" else (SMALL_RUN,), "fp32")
    own = throughput.NAMES[dtype] if dtype == "fp32" else None  # or each model's
    for *given, seconds in THROUGHPUT:
        clock = Clock(seconds=seconds, min_rounds=3, cpu_time="--cpu-time" in how)
        yield f"throughput {' '.join(map(str, given))} {dtype}", partial(throughput.lines, *given, clock, own)
    yield from named(LONG_RUNS, dtype)


def _file(device: str, page: str) -> Path:
    name = re.sub(r"\W+", "-", device.lower()).strip("-")
    return RESULTS / f"{datetime.date.today()}-{name}{page.removeprefix('benchmarks').replace('_', '-')}.jsonl"


def _begun(path: Path, about: LINE, page: str, runs: Collection[str]) -> set[str]:
    """Names of the runs that a file of results has: for this page, out of `runs`, of this machine and these versions.
    The commit may differ: the page names all."""
    if (of := path.name[len("YYYY-MM-DD") :]) != (ours := _file(about["device"], page).name[len("YYYY-MM-DD") :]):
        raise SystemExit(f"--resume: a file of docs/{page}.md is called DATE{ours}, got DATE{of}")
    try:
        lines = [json.loads(text) for text in path.read_text().splitlines()]
    except ValueError as error:
        raise SystemExit(f"--resume: {path.name} must have one JSON object a line: {error}") from error
    for line in lines:
        if "run" not in line:
            raise SystemExit(f"--resume: lines must name their run, got {path.name} of an older bench")
        if line["run"] not in runs:
            raise SystemExit(f"--resume: no run of this record (another --dtype?) is in {path.name}: {line['run']}")
        for name in about.keys() - {"date", "commit"}:
            if (there := line.get(name)) != about[name]:
                raise SystemExit(f"--resume: {name} must be {there} as in {path.name}, got {about[name]}")
    return {line["run"] for line in lines}


def rounded(value: Any) -> Any:
    """Floats to four digits: more are noise, and the file is committed."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value

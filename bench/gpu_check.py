"""The tests marked gpu and the timings on a CUDA device, written as one report; called by bench/gpu_check.sh."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.one_case import OPS
from bench.peers import PEERS
from bench.timing import machine
from uvg_engine import backends
from uvg_engine.backends import gpu_limits
from uvg_engine.cli._op_calls import CALLS, ask
from uvg_engine.files import replacing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
TESTS_LAST, OP_LASTS = 240, 60  # seconds at most, of the tests and of an op's timings
LEAST_OP, PEERS_SHARE = 8, 5  # seconds below which no op is begun; of an op's, one in five for a peer to be compiled
ALL_LASTS, LEAST = 470, 120  # seconds of build, tests and timings; of the last two, however long the build took
CASES, FUZZ = "tests/ops/test_on_gpu.py", "tests/ops/test_fuzz.py"
TOGETHER = "tests/ops/test_triton_modes.py tests/ops/test_triton_philox.py tests/ops/test_triton_configurations.py"
TESTERS = 16  # processes at most: most of the tests' time goes into compiling kernels, on one core each
SIZE = "1.3b-8192"  # large enough that the device is timed and not the host


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report and prints where it is; returns 0 only where at least one test ran and nothing failed."""
    parser = argparse.ArgumentParser(prog="bench/gpu_check.sh", description=__doc__)
    parser.add_argument("--no-bench", action="store_true", help="tests only")
    parser.add_argument("--spent", type=int, default=0, metavar="SECONDS", help="that building took: they count")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(json.dumps({"ok": False, "reason": f"torch {torch.__version__} sees no CUDA device here"}))
        return 1
    left = max(LEAST, ALL_LASTS - args.spent)
    end = time.monotonic() + left
    about = machine("cuda") | {"cuda": torch.version.cuda, "limits": limits()}
    found: dict[str, Any] = {"machine": about, "peers": peers(), "backends": served()}
    found["tests"] = run_tests(time.monotonic() + min(TESTS_LAST, left / 2))
    found["bench"], found["not timed"] = ([], {}) if args.no_bench else run_bench(end)
    wrong = [line for line in found["bench"] if "wrong" in line]
    found["ok"] = bool(found["tests"]["passed"]) and not (found["tests"]["failures"] or found["not timed"] or wrong)
    name = f"gpu_{torch.cuda.get_device_name()}_{about.get('commit', 'unknown')}".replace(" ", "_").replace("/", "_")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    with replacing(path) as temporary:
        temporary.write_text(report(found))
    print(json.dumps({"ok": found["ok"], "report": os.path.relpath(path, ROOT)}))
    return 0 if found["ok"] else 1


def limits() -> Any:
    """Of the GPU in use, as cuda-python tells them, or why it does not."""
    found, reason = gpu_limits.limits()
    return reason or dataclasses.asdict(found[torch.cuda.current_device()])


def peers() -> dict[str, str]:
    """Each peer with why it is not available here, or "available"."""
    return {name: library.missing("cuda") or "available" for name, library in PEERS.items()}


def served() -> dict[str, str]:
    """Each backend with the ops that it serves in bf16, and why not the others of its table."""
    said = {op: ask(op, "cuda", torch.bfloat16) for op in CALLS}
    lines = {}
    for name in backends.names():
        no = {op: said[op]["error"] or said[op]["refused"].get(name) for op in sorted(backends.table(name))}
        able = ", ".join(op for op, reason in no.items() if reason is None)
        reasons = "; ".join(dict.fromkeys(reason for reason in no.values() if reason is not None))
        lines[name] = able + f"{'; ' * bool(able)}not available: {reasons}" * bool(reasons)
    return lines


def shards() -> dict[str, list[str]]:
    """What pytest is given, by name: of each op its cases, then what the op must keep and a fuzz; the order to run."""
    found = {f"{op}, cases": ["-k", f"[{op}-", CASES] for op in backends.table("reference")}
    for op in filter(_is_ours, backends.table("reference")):
        found[f"{op}, properties"] = ["-k", f"fuzzed[{op}- or not fuzzed", f"tests/ops/test_{op}.py", FUZZ]
    return found | {"all ops together": TOGETHER.split()}


def run_tests(end: float) -> dict[str, Any]:
    """The tests marked gpu in processes, several at a time; done by `end` or failed."""
    with ThreadPoolExecutor(min(TESTERS, os.cpu_count() or 1)) as pool, tempfile.TemporaryDirectory() as folder:
        jobs = [pool.submit(shard, name, what, Path(folder), end) for name, what in shards().items()]
        found = [job.result() for job in jobs]
    together: dict[str, Any] = {key: sum(each[key] for each in found) for key in ("passed", "skipped")}
    return together | {"failures": [failure for each in found for failure in each["failures"]]}


def shard(name: str, what: Sequence[str], folder: Path, end: float) -> dict[str, Any]:
    """What `counted` tells of a shard's tests; that they did not end is a failure."""
    path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.xml"
    left = int(end - time.monotonic())
    if left < 1:
        return {"passed": 0, "skipped": 0, "failures": [f"{name}: not begun, the time for tests was over"]}
    code, told = _python(left, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={path}", *what)
    if path.exists():
        return counted(path.read_text())
    why = f"not done after {left} s" if code == 124 else f"pytest wrote no report: {told[-500:]}"
    return {"passed": 0, "skipped": 0, "failures": [f"{name}: {why}"]}


def counted(report: str) -> dict[str, Any]:
    """Passed, skipped and the failures' names and first lines, from pytest's JUnit report."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    failures = [
        f"{case.get('classname')}::{case.get('name')}: {(bad.get('message') or '').splitlines()[:1]}"
        for case in cases
        for bad in case
        if bad.tag in ("failure", "error")
    ]
    skipped = sum(any(part.tag == "skipped" for part in case) for case in cases)
    return {"passed": len(cases) - skipped - len(failures), "skipped": skipped, "failures": failures}


def timed() -> list[str]:
    """What is timed: the ops that a backend of ours has on a GPU, and the block."""
    return [*filter(_is_ours, OPS), "block"]


def _is_ours(op: str) -> bool:
    return any(op in backends.table(name) for name in ("cuda", "triton"))


def run_bench(end: float) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(lines of every op, op -> why it has none): a process for each, so that one that fails takes no other along."""
    lines: list[dict[str, Any]] = []
    missing = {}
    for place, op in enumerate(names := timed()):
        left = int(
            min(OP_LASTS, 2 * (end - time.monotonic()) / (len(names) - place))
        )  # many take less than their share
        left = min(max(left, LEAST_OP), int(end - time.monotonic()))
        if left < LEAST_OP:
            missing[op] = "the time for all of it was over"
            continue
        options = ("--device", "cuda", "--dtype", "bf16", "--size", SIZE, "--seconds", "0.2", "--json")
        options += ("--peer-seconds", str(left // PEERS_SHARE))
        code, told = _python(left, "-m", "bench", op, *options)
        lines += [json.loads(text) for text in told.splitlines() if text.startswith("{")]
        if code:
            missing[op] = f"exit {code}: {told.strip().splitlines()[-1:]}"
    return lines, missing


def report(found: dict[str, Any]) -> str:
    """The whole as Markdown."""
    tests = found["tests"]
    lines = [
        *("# The kernels on a GPU", "", f"All well: {'yes' if found['ok'] else 'no'}.", ""),
        *("## Machine", "", *(f"- {name}: {value}" for name, value in found["machine"].items()), ""),
        *("## Backends", "", *(f"- `{name}`: {ops}" for name, ops in found["backends"].items()), ""),
        *("## Peers", "", *(_peer(name, reason) for name, reason in found["peers"].items()), ""),
        *(
            "## Tests",
            "",
            f"{tests['passed']} passed, {tests['skipped']} skipped, {len(tests['failures'])} failed.",
            "",
        ),
        *(f"- {failure}" for failure in tests["failures"]),
        *(
            "",
            "## Timings",
            "",
            "| op | shape | pass | backend | ms | of roof | times faster than |",
            "|---|---|---|---|---|---|---|",
        ),
        *(_row(line) for line in found["bench"]),
        *("", *(f"- {op}: not timed, {reason}" for op, reason in found["not timed"].items())),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _peer(name: str, reason: str) -> str:
    return f"- `{name}`: {reason if reason == 'available' else f'not available: {reason}'}"


def _row(line: dict[str, Any]) -> str:
    told = next((f"{kind}: {line[kind]}" for kind in ("missing", "refused", "wrong", "slow") if kind in line), "")
    told = told.replace("missing: ", "not available: ")
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in line.get("times_faster", {}).items())
    time_told = f"{line['ms']:.3f} | {line['of_roof']:.0%}" if "ms" in line else "- | -"
    head = " | ".join(str(line.get(name, "")) for name in ("op", "shape", "pass", "backend"))
    return f"| {head} | {time_told} | {ratios or told} |"


def _python(seconds: int, *arguments: str) -> tuple[int, str]:
    """(exit code, output) of a Python process; 124 where it took too long."""
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as late:
        text = late.stdout or b""
        return 124, text.decode() if isinstance(text, bytes) else text
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main())

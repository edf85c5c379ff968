"""The tests marked gpu and the timings on a CUDA device, written as one report; called by bench/gpu_check.sh."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.one_case import OPS
from bench.peers import PEERS
from bench.timing import machine
from uvg_engine import backends
from uvg_engine.backends import gpu_limits

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
TESTS_LAST, OP_LASTS, ALL_LASTS = 210, 60, 440  # seconds at most: of the tests, of an op's timings, of both together


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report and prints where it is; returns 0 only where at least one test ran and nothing failed."""
    parser = argparse.ArgumentParser(prog="bench/gpu_check.sh", description=__doc__)
    parser.add_argument("--no-bench", action="store_true", help="tests only")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(json.dumps({"ok": False, "reason": f"torch {torch.__version__} sees no CUDA device here"}))
        return 1
    end = time.monotonic() + ALL_LASTS
    about = machine("cuda") | {"cuda": torch.version.cuda, "limits": limits()}
    found: dict[str, Any] = {"machine": about, "peers": peers(), "backends": served(), "tests": run_tests()}
    found["bench"], found["not timed"] = ([], {}) if args.no_bench else run_bench(end)
    wrong = [line for line in found["bench"] if "wrong" in line]
    found["ok"] = bool(found["tests"]["passed"]) and not (found["tests"]["failures"] or found["not timed"] or wrong)
    name = f"gpu_{torch.cuda.get_device_name()}_{about.get('commit', 'unknown')}".replace(" ", "_").replace("/", "_")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text(report(found))
    print(json.dumps({"ok": found["ok"], "report": str(path.relative_to(ROOT))}))
    return 0 if found["ok"] else 1


def limits() -> Any:
    """Of the GPU in use, as cuda-python tells them, or why it does not."""
    found, reason = gpu_limits.limits()
    return reason or dataclasses.asdict(found[torch.cuda.current_device()])


def peers() -> dict[str, str]:
    """Each peer with why it is not available here, or "available"."""
    return {name: library.missing("cuda") or "available" for name, library in PEERS.items()}


def served() -> dict[str, str]:
    """Each backend with the ops of its table."""
    return {name: ", ".join(sorted(backends.table(name))) for name in backends.names()}


def run_tests() -> dict[str, Any]:
    """The tests marked gpu."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.xml")
        told = _python(TESTS_LAST, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={path}", str(ROOT / "tests"))[1]
        if not path.exists():
            return {"passed": 0, "skipped": 0, "failures": [f"pytest wrote no report: {told[-500:]}"]}
        return counted(path.read_text())


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


def run_bench(end: float) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(lines of every op, op -> why it has none): a process for each, so that one that fails takes no other along."""
    lines: list[dict[str, Any]] = []
    missing = {}
    for op in (*OPS, "block"):
        left = int(min(OP_LASTS, end - time.monotonic()))
        if left < 5:
            missing[op] = f"the {ALL_LASTS} seconds were over"
            continue
        options = ("--device", "cuda", "--dtype", "bf16", "--seconds", "0.2", "--json")
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

"""The tests marked gpu and the timings on a CUDA device, told as one JSON object; called by bench/gpu_check.sh."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.timing import machine

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the object; returns 0 only where at least one test ran and nothing failed."""
    parser = argparse.ArgumentParser(prog="bench/gpu_check.sh", description=__doc__)
    parser.add_argument("--no-bench", action="store_true", help="tests only")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(json.dumps({"ok": False, "reason": f"torch {torch.__version__} sees no CUDA device here"}))
        return 1
    about = machine("cuda") | {"cuda": torch.version.cuda, "capability": list(torch.cuda.get_device_capability())}
    found: dict[str, Any] = {"machine": about, "tests": run_tests()}
    ok = found["tests"]["passed"] > 0 and not found["tests"]["failures"]
    if not args.no_bench:
        done = _python("-m", "bench", "--device", "cuda", "--json")
        lines = [json.loads(text) for text in done.stdout.splitlines()]
        found["bench"] = [{name: value for name, value in line.items() if name not in about} for line in lines]
        ok = ok and done.returncode == 0
    print(json.dumps({"ok": ok, **found}, indent=1))
    return 0 if ok else 1


def run_tests() -> dict[str, Any]:
    """The tests marked gpu."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        _python("-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", str(ROOT / "tests"))
        if not report.exists():
            return {"passed": 0, "skipped": 0, "failures": ["pytest wrote no report"]}
        return counted(report.read_text())


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


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    return done


if __name__ == "__main__":
    sys.exit(main())

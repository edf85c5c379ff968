"""The tests marked gpu and the timings on a CUDA device, written as one report; called by bench/gpu_check.sh.

This process meets no device: whatever may hang is a process of its own that is waited for until a given time and no
longer, so that the report is written in time whatever hangs, fails or breaks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bench.one_case import OPS
from bench.peers import PEERS
from bench.timing import machine
from uvg_engine import backends
from uvg_engine.backends import gpu_limits
from uvg_engine.cli import _op_calls
from uvg_engine.files import replacing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
TESTS_LAST, OP_LASTS = 260, 60  # seconds at most, of the tests and of an op's timings
TESTS_SHARE = 0.55  # of the time that is left, at most
LEAST_OP = 8  # seconds below which no op is begun
GRACE = 5  # seconds in which tests whose time is over tell what they found
PEER_LASTS, COLD_PEER_LASTS = 10, 60  # that a peer may take to be compiled; where no cache has it
ALL_LASTS = 468  # seconds of build, tests and timings; gpu_check.sh ends all at 480, and what it builds at 350
ABOUT_LASTS = 45  # seconds at most until it is known what the machine is
PIPE_LASTS = 3  # seconds in which a process that was killed has to be gone; one that hangs in a driver stays
CASES, FUZZ = "tests/ops/test_on_gpu.py", "tests/ops/test_fuzz.py"
TOGETHER = "tests/ops/test_triton_modes.py tests/ops/test_triton_philox.py tests/ops/test_triton_configurations.py"
TESTERS = 16  # processes at most: most of the tests' time goes into compiling kernels, on one core each
# Threads of several processes would wait for each other spinning: two tests' processes of two threads each took six
# times as long on two cores. And inductor would start compilers of its own for every core.
ONE_CORE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
# Whose cases take one core the longest to compile (python -m bench.gpu_variants): a process for each dtype.
BY_DTYPE = ("window_attention", "flash_attention", "moe_mlp", "linear_cross_entropy")
DTYPES = {"fp32": "not float16", "bf16": "bfloat16", "fp16": "float16 and not bfloat16"}  # as tests' names have them
_RUNNING: set[int] = set()  # groups of the processes that were begun and have not ended
SIZE = "1.3b-8192"  # large enough that the device is timed and not the host


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report and prints where it is; returns 0 only where at least one test ran and nothing failed."""
    parser = argparse.ArgumentParser(prog="bench/gpu_check.sh", description=__doc__)
    parser.add_argument("--no-bench", action="store_true", help="tests only")
    parser.add_argument("--spent", type=int, default=0, metavar="SECONDS", help="that building took: they count")
    parser.add_argument("--asked", type=int, metavar="EPOCH", help="when that was known: imports count too")
    for what, help in (("served", "which backend serves what"), ("about", "machine and peers")):
        parser.add_argument(f"--{what}", action="store_true", help=f"{help}, as JSON, and no more")
    args = parser.parse_args(arguments)
    if args.served or args.about:
        print(json.dumps(served() if args.served else about()))
        return 0
    begun = time.monotonic()
    imports = 0 if args.asked is None else max(0, time.time() - args.asked)
    left = max(0, ALL_LASTS - args.spent - imports)
    found, why = ask("--about", min(begun + ABOUT_LASTS, begun + left))
    if found.get("device") is None and not why:
        print(json.dumps({"ok": False, "reason": f"{found['torch']} sees no CUDA device here"}))
        return 1
    found = {"device": "unknown", "machine": {}, "peers": {}, **found, **nothing(), "broken": why}
    if not why:
        try:
            fill(found, begun + min(TESTS_LAST, TESTS_SHARE * left), begun + left, args.no_bench)
        except Exception as error:  # of the check itself: told beside what was found until then
            traceback.print_exc()
            found["broken"] = f"{type(error).__name__}: {error}"
    wrong = [line for line in found["bench"] if "wrong" in line]
    tests = found["tests"]
    lacks = (tests["failures"], tests["not done"], found["not timed"], found["not asked"], found["broken"], wrong)
    found["ok"] = bool(tests["passed"]) and not any(lacks)
    name = f"gpu_{found['device']}_{found['machine'].get('commit', 'unknown')}".replace(" ", "_").replace("/", "_")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    with replacing(path) as temporary:
        temporary.write_text(report(found))
    print(json.dumps({"ok": found["ok"], "report": os.path.relpath(path, ROOT)}))
    return 0 if found["ok"] else 1


def nothing() -> dict[str, Any]:
    """What is found where no part of the check has begun: all of it left out, by name."""
    untested = [f"{name}: not begun" for name in shards()]
    tests = {"passed": 0, "skipped": 0, "failures": [], "not done": untested}
    untimed = dict.fromkeys(timed(), "not begun")
    return {"tests": tests, "backends": {}, "not asked": "not begun", "bench": [], "not timed": untimed}


def fill(found: dict[str, Any], tests_end: float, end: float, no_bench: bool) -> None:
    """Put in what each part of the check finds."""
    if no_bench:
        found["not timed"] = {}
    with ThreadPoolExecutor(1) as beside:
        answer = beside.submit(ask, "--served", tests_end)
        found["tests"] = run_tests(tests_end, warm=not no_bench)
        found["backends"], found["not asked"] = answer.result()
    if not no_bench:
        found["bench"], found["not timed"] = run_bench(end)


def about() -> dict[str, Any]:
    """The device (None: there is none), the machine, and each peer."""
    told = {"device": None, "torch": f"torch {torch.__version__} for CUDA {torch.version.cuda}"}
    if not torch.cuda.is_available():
        return told
    here = machine("cuda") | {"cuda": torch.version.cuda, "limits": limits()}
    return told | {"device": torch.cuda.get_device_name(), "machine": here, "peers": peers()}


def limits() -> Any:
    """Of the GPU in use, as cuda-python tells them, or why it does not."""
    found, reason = gpu_limits.limits()
    return reason or dataclasses.asdict(found[torch.cuda.current_device()])


def peers() -> dict[str, str]:
    """Each peer with why it is not available here, or "available"."""
    return {name: library.missing("cuda") or "available" for name, library in PEERS.items()}


def served() -> dict[str, str]:
    """Each backend with the ops that it serves in bf16, and why not the others of its table."""
    said = {op: _op_calls.ask(op, "cuda", torch.bfloat16) for op in _op_calls.CALLS}
    lines = {}
    for name in backends.names():
        no = {op: said[op]["error"] or said[op]["refused"].get(name) for op in sorted(backends.table(name))}
        able = ", ".join(op for op, reason in no.items() if reason is None)
        reasons = "; ".join(dict.fromkeys(reason for reason in no.values() if reason is not None))
        lines[name] = able + f"{'; ' * bool(able)}not available: {reasons}" * bool(reasons)
    return lines


def ask(what: str, end: float) -> tuple[dict[str, Any], str]:
    """(what `--served` or `--about` tells, or nothing and why): asked in a process that may hang."""
    left = int(end - time.monotonic())
    if left < 1:
        return {}, "the time for it was over"
    code, told = _python(left, "-m", "bench.gpu_check", what, environment=ONE_CORE)
    if code == 0 and (lines := _objects(told)):
        return lines[-1], ""
    return {}, f"{what[2:]}: exit {code}: {told.strip().splitlines()[-1:]}"


def _objects(told: str) -> list[dict[str, Any]]:
    """The lines that are JSON objects; the last one of a process that was ended may be cut off."""
    found = []
    for text in told.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found += [json.loads(text)] if text.startswith("{") else []
    return found


def shards() -> dict[str, list[str]]:
    """What pytest is given, by name, in the order to run: of each op its cases, the longest first, then all ops
    together, then what each op must keep and a fuzz, most of whose kernels the cases have compiled."""
    found = {
        f"{op}, cases in {dtype}": ["-k", f"[{op}- and {which}", CASES]
        for op in BY_DTYPE
        for dtype, which in DTYPES.items()
    }
    ops = [op for op in backends.table("reference") if op not in BY_DTYPE]
    found |= {f"{op}, cases": ["-k", f"[{op}-", CASES] for op in sorted(ops, key=_is_ours, reverse=True)}
    found["all ops together"] = ["-k", "test", *TOGETHER.split()]
    for op in (*BY_DTYPE, *filter(_is_ours, ops)):
        found[f"{op}, properties"] = ["-k", f"fuzzed[{op}- or not fuzzed", f"tests/ops/test_{op}.py", FUZZ]
    return found


def run_tests(end: float, warm: bool = False) -> dict[str, Any]:
    """The tests marked gpu in processes, several at a time; what is not done by `end` is told. warm: after the cases
    begin the timings' own compilers, whose results their caches keep."""
    with ThreadPoolExecutor(min(TESTERS, os.cpu_count() or 1)) as pool, tempfile.TemporaryDirectory() as folder:
        jobs = []
        for name, what in shards().items():
            if warm and name == "all ops together":
                for op in timed():
                    pool.submit(_warm, op, end)
            jobs.append(pool.submit(shard, name, what, Path(folder), end))
        found = [job.result() for job in jobs]
    together: dict[str, Any] = {key: sum(each[key] for each in found) for key in ("passed", "skipped")}
    return together | {key: [one for each in found for one in each[key]] for key in ("failures", "not done")}


def shard(name: str, what: Sequence[str], folder: Path, end: float) -> dict[str, Any]:
    """What `counted` tells of a shard's tests, or why they were not done."""
    path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.xml"
    left = int(end - time.monotonic()) - GRACE
    none: dict[str, Any] = {"passed": 0, "skipped": 0, "failures": [], "not done": []}
    if left < 1:
        return none | {"not done": [f"{name}: not begun, the time for tests was over"]}
    command = ("-m", "pytest", "-q", "-m", "gpu", f"--junitxml={path}", *what)
    code, told = _ended(_begun(*command, environment=ONE_CORE), left, grace=GRACE)
    found = none
    with contextlib.suppress(FileNotFoundError, ElementTree.ParseError):  # of a process that was killed
        found = none | counted(path.read_text())
    if code == 124:
        return found | {"not done": [f"{name}: not ended after {left} s"]}
    return found if found is not none else none | {"failures": [f"{name}: pytest wrote no report: {told[-500:]}"]}


def _warm(op: str, end: float) -> None:
    """An op's timings for their compilers' sake: what they tell and whether they end is the timed run's to say."""
    left = int(end - time.monotonic())
    if left > LEAST_OP:
        _python(left, *_timing(op, "0", COLD_PEER_LASTS), environment=ONE_CORE)


def counted(report: str) -> dict[str, Any]:
    """Passed, skipped and the failures' names and first lines, from pytest's JUnit report."""
    root = ElementTree.fromstring(report)
    cases = list(root.iter("testcase"))
    done = sum(int(suite.attrib["tests"]) for suite in root.iter("testsuite"))  # one that was interrupted is a case too
    failures = [
        f"{case.get('classname')}::{case.get('name')}: {(bad.get('message') or '').splitlines()[:1]}"
        for case in cases
        for bad in case
        if bad.tag in ("failure", "error")
    ]
    skipped = sum(any(part.tag == "skipped" for part in case) for case in cases)
    return {"passed": done - skipped - len(failures), "skipped": skipped, "failures": failures}


def timed() -> list[str]:
    """What is timed: the ops that a backend of ours has on a GPU, and the block."""
    return [*filter(_is_ours, OPS), "block"]


def _is_ours(op: str) -> bool:
    return any(op in backends.table(name) for name in ("cuda", "triton"))


def run_bench(end: float) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(lines of every op, op -> why it has none): a process for each, so that one that fails takes no other along. It
    imports torch and meets the device while the one before it has its turn."""
    lines: list[dict[str, Any]] = []
    missing = {}
    names, coming = timed(), None
    for place, op in enumerate(names):
        # many take less than their share
        left = int(min(OP_LASTS, 2 * (end - time.monotonic()) / (len(names) - place)))
        left = min(max(left, LEAST_OP), int(end - time.monotonic()))
        if left < LEAST_OP:
            missing[op] = "the time for all of it was over"
            continue
        process = coming or _begun(*_timing(op, "0.2", PEER_LASTS), "--wait")
        coming = _begun(*_timing(names[place + 1], "0.2", PEER_LASTS), "--wait") if place + 1 < len(names) else None
        code, told = _ended(process, left, "go\n")
        lines += _objects(told)
        if code:
            missing[op] = f"exit {code}: {told.strip().splitlines()[-1:]}"
    if coming:
        _ended(coming, 0)
    return lines, missing


def _timing(op: str, seconds: str, peer_lasts: int) -> tuple[str, ...]:
    how = ("--device", "cuda", "--dtype", "bf16", "--size", SIZE, "--json", "--peer-seconds", str(peer_lasts))
    return ("-m", "bench", op, *how, "--seconds", seconds)


def report(found: dict[str, Any]) -> str:
    """The whole as Markdown."""
    tests = found["tests"]
    lines = [
        *("# The kernels on a GPU", "", f"All well: {'yes' if found['ok'] else 'no'}.", ""),
        *([f"The check itself did not end well: {found['broken']}", ""] if found["broken"] else []),
        *("## Machine", "", *(f"- {name}: {value}" for name, value in found["machine"].items()), ""),
        *("## Backends", "", *(f"- `{name}`: {ops}" for name, ops in found["backends"].items())),
        *(f"- not asked: {reason}" for reason in [found["not asked"]] if reason),
        "",
        *("## Peers", "", *(_peer(name, reason) for name, reason in found["peers"].items()), ""),
        *(
            "## Tests",
            "",
            f"{tests['passed']} passed, {tests['skipped']} skipped, {len(tests['failures'])} failed.",
            "",
        ),
        *(f"- {failure}" for failure in tests["failures"]),
        *(f"- not done: {shard}" for shard in tests["not done"]),
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


def _python(seconds: int, *arguments: str, environment: Mapping[str, str] = MappingProxyType({})) -> tuple[int, str]:
    """`_ended` of a Python process."""
    return _ended(_begun(*arguments, environment=environment), seconds)


def _begun(*arguments: str, environment: Mapping[str, str] = MappingProxyType({})) -> subprocess.Popen[str]:
    """A Python process with a session of its own: compilers leave processes behind."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        **{"cwd": ROOT, "env": os.environ | environment, "text": True, "start_new_session": True},
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )
    _RUNNING.add(process.pid)
    return process


def _ended(process: subprocess.Popen[str], seconds: int, word: str | None = None, grace: int = 0) -> tuple[int, str]:
    """(exit code, output) of a process that is told a word; 124 where it took too long. grace: seconds that it has left
    when it is interrupted. Returns PIPE_LASTS seconds after all that, even if what was killed is still there or has
    left its pipe to someone."""
    try:
        output, _ = process.communicate(word, timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        code = 124
        if grace:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=grace)
    finally:
        _kill(process.pid)
    if code == 124:
        try:
            output, _ = process.communicate(timeout=PIPE_LASTS)
        except subprocess.TimeoutExpired as error:
            output = (error.output or b"").decode(errors="replace")
    elif code:
        print(output, file=sys.stderr)
    return code, output


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    _RUNNING.discard(group)


def _stop(number: int, frame: Any) -> None:
    """On a signal: sessions of their own do not get it."""
    for group in tuple(_RUNNING):
        _kill(group)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _stop)
    sys.exit(main())

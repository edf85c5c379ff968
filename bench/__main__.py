"""Time ops, a block and sampling on every backend that serves them, beside their peers, in turns in one process.

What is wrong or refused is told and not timed. Ratios are medians over rounds in which both were timed: they hold on a
noisy machine better than the milliseconds do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.case import PASSES, SIZES
from bench.one_case import NAMES, Line, Options, bench_case, cases
from bench.peers import PEERS
from bench.record import record
from bench.sampling import bench_sampling
from bench.timing import MIN_ROUNDS, Clock, Roof, duration, machine, positive
from uvg_engine import backends
from uvg_engine.process import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OF_A_RECORD = ("record", "resume", "dtype", "threads", "cpu_time", "json")  # its runs have the other options themselves
MORE = """Programs of their own, with --help: bench.throughput_generate, _caption, _joint and _train (end to end beside
a plain loop), bench.report (a recorded file as a page), bench.wheel_check (our wheel beside other versions of torch);
for kernels of GPUs bench.aot, aot_rocm, cuda_static, gpu_variants, tune. docs/benchmarks.md says how it is measured."""
RATES = ("requests_per_second", "samples_per_second", "tokens_per_second")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 where a result was wrong."""
    args = _parse(arguments)
    keep_freed_memory()  # for all contenders; processes that measure memory do not
    if args.threads:
        torch.set_num_threads(args.threads)
    about = machine(args.device)
    if args.wait:
        torch.empty(1, device=args.device)
        if not sys.stdin.readline():
            return 1
    wrong: list[Line] = []

    def told(lines: Iterator[Line]) -> Iterator[Line]:
        for line in lines:
            if "wrong" in line:
                wrong.append(line)
            print(json.dumps(line | about) if args.json else _text(line), flush=True)
            yield line

    if args.record:
        how = (["--threads", str(args.threads)] if args.threads else []) + ["--cpu-time"] * args.cpu_time
        about["clock"] = "CPU time" if args.cpu_time else "wall"
        dtype = "bf16" if args.dtype is None or "bf16" in args.dtype else "fp32"
        print(record(lambda given: _lines(_parse(given)), told, how, about, args.record, dtype, args.resume))
    else:
        if not args.json:
            print("  ".join(f"{key} {value}" for key, value in about.items()), flush=True)
        if not sum(1 for _ in told(_lines(args))):
            print("nothing was timed: no case has such a pass, backend or peer", file=sys.stderr)
            return 2
    return int(bool(wrong))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    what = [*NAMES, "sampling"]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, epilog=MORE)
    parser.add_argument("what", nargs="*", help=f"out of {', '.join(what)}; all if none is named")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="fp32 and bf16 if not given")
    parser.add_argument("--size", choices=SIZES, action="append", help="if not given: those of the table of cases")
    parser.add_argument("--pass", choices=PASSES, action="append", dest="passes", help="if not given: the case's own")
    parser.add_argument("--only", action="append", help="this backend or peer only (may be repeated)")
    parser.add_argument("--seconds", type=duration, default=1.0, help="for each contender (default 1)")
    parser.add_argument("--peer-seconds", type=duration, help="that a peer may take to compile (no end if not given)")
    parser.add_argument("--threads", type=positive, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--cpu-time", action="store_true", help="time by the cores' seconds; needs --threads 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, few rounds, no inductor: that it runs, not how fast"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory too, each in a process of its own")
    parser.add_argument(
        "--record",
        nargs="?",
        const="benchmarks",
        choices=("benchmarks", "benchmarks_avx2"),
        help="all that stands in docs/benchmarks.md or a page like it, written there; with --dtype fp32 in fp32",
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="with --record: run what this record lacks")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--wait", action="store_true", help="begin when a line comes in, the device made ready")
    args = parser.parse_args(arguments)
    if strangers := sorted(set(args.what) - set(what)):
        parser.error(f"nothing here is called {', '.join(strangers)}; have {', '.join(what)}")
    contenders = [*backends.names(), "uvg", *PEERS]
    if strangers := sorted(set(args.only or ()) - set(contenders)):
        parser.error(f"--only: no backend or peer is called {', '.join(strangers)}; have {', '.join(contenders)}")
    if args.resume and not (args.record and args.resume.is_file()):
        parser.error(f"--resume needs --record and a file of results, got {args.resume}")
    if args.peer_seconds == 0:
        parser.error("--peer-seconds must be more than 0")
    if args.record:
        asked = {name: value for name, value in vars(args).items() if value not in (parser.get_default(name), [])}
        if strangers := sorted(asked.keys() - set(OF_A_RECORD)):
            names = {"what": " ".join(args.what), "passes": "--pass"}
            told = ", ".join(names.get(name, f"--{name.replace('_', '-')}") for name in strangers)
            parser.error(f"--record has runs of its own, on the CPU: leave out {told}")
        if len(args.dtype or ()) > 1:
            parser.error(f"--record takes one --dtype, got {' and '.join(args.dtype)}")
    if args.memory and args.device != "cpu":
        parser.error(f"--memory is measured on the CPU only, got --device {args.device}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    if args.cpu_time and (args.threads != 1 or args.device != "cpu"):
        parser.error("--cpu-time needs --threads 1 on the CPU: the time of several cores would be added up")
    args.what = args.what or what
    args.size = args.size or (["digits"] if args.quick else [])
    return args


def _lines(args: argparse.Namespace) -> Iterator[Line]:
    rounds = 3 if args.quick else MIN_ROUNDS
    clock = Clock(args.device, 0.0 if args.quick else args.seconds, rounds, args.cpu_time)
    roof = Roof(clock)
    left_out = ("inductor",) if args.quick else ()
    options = Options(tuple(args.only or ()), tuple(args.passes or PASSES), args.memory, left_out, args.peer_seconds)
    for name in (name for name in args.what if name != "sampling"):
        for dtype in args.dtype or DTYPES:
            for case in cases(name):
                for size in args.size or case.sizes:
                    yield from bench_case(name, case, size, DTYPES[dtype], roof, options)
    if "sampling" in args.what:
        yield from bench_sampling(clock, num_requests=8, num_steps=2 if args.quick else 20)


def _text(line: Line) -> str:
    where = f"{line['op']} {line.get('case', '')}".strip()
    head = f"{where:24} {line['shape']:36} {line['dtype']:8} {line['pass']:16} {line['backend']:12}"
    if reason := next((f"{why}: {line[why]}" for why in ("missing", "refused", "wrong", "slow") if why in line), ""):
        return f"{head} {reason}"
    told = [f"{line['ms']:9.3f} ms +-{line['spread']:4.0%}"]
    if "gflops" in line:
        told.append(f"{line['gflops']:7.1f} GFLOP/s {line['gbs']:6.1f} GB/s {line['of_roof']:4.0%} of the roof")
    told += [f"{line[rate]:.3g} {rate.replace('_per_second', '/s')}" for rate in RATES if rate in line]
    if "extra_mb" in line:
        told.append(f"{line['extra_mb']:.0f} MB")
    told += [f"{ratio:.2f} x {other}" for other, ratio in line.get("times_faster", {}).items()]
    return f"{head} {'  '.join(told)}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # what was measured is told, and in the file of --record
        sys.exit(130)

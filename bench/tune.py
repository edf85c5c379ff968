"""Search better configurations of the Triton kernels on a real GPU, offline, and print them to be pasted.

For each entry of the tables (kernels/_configs.py) that an op chooses at this size, its neighbours are timed in turns
with it; the winners of a field are combined until nothing gains. Nothing here runs at import of the library: what ships
stands in kernels/.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.case import BOTH, FORWARD, SIZES
from bench.one_case import SLACK, _moved, _pass, _tensors, cases, difference
from bench.timing import Clock
from uvg_engine import backends

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LIMITS = {"num_warps": (1, 32), "num_stages": (1, 6), "maxnreg": (32, 255)}  # other fields: sizes of a tile
TILE = (1, 8192)
REGISTERS = 128  # tried first where ptxas was told nothing
GAIN = 1.03  # times faster than before, or it is noise

Place = tuple[str, tuple[Any, ...]]  # a table's name and a key of its entries
Times = Callable[["Choices", Place, Sequence[Any]], Sequence[float]]


class Choices:
    """Stands between the tables and whoever chooses: notes what is asked, and answers with what was set for it."""

    def __init__(self) -> None:
        self.asked: dict[Place, Any] = {}
        self.set: dict[Place, Any] = {}

    def __call__(self, table: Any, key: tuple[Any, ...], config: Any) -> Any:
        place = (table.name, key)
        self.asked[place] = config
        return self.set.get(place, config)


def neighbours(config: Any) -> Iterator[Any]:
    """Configurations that differ in one field: half and double of a size, one stage more or less, the other truth, a
    limit of registers or none; not in `held`, which follows from them (tests/test_aot.py tells what it must be)."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "held":
            continue
        if isinstance(value, bool):
            others: tuple[Any, ...] = (not value,)
        elif field.name == "num_stages":
            others = (value - 1, value + 1)
        elif field.name == "maxnreg":
            others = (REGISTERS,) if value is None else (None, value // 2, 2 * value)
        else:
            others = (value // 2, 2 * value)
        low, high = LIMITS.get(field.name, TILE)
        for other in others:
            if other is None or isinstance(other, bool) or low <= other <= high:
                yield dataclasses.replace(config, **{field.name: other})


def search(default: Any, seconds: Callable[[Sequence[Any]], Sequence[float]]) -> tuple[Any, float]:
    """(the best configuration found, times faster than the default). seconds: times configurations together."""
    best, gained = default, 1.0
    while True:
        others = list(neighbours(best))
        before, *times = seconds([best, *others])
        index = min(range(len(times)), key=times.__getitem__, default=None)
        if index is None or times[index] == float("inf") or before < GAIN * times[index]:
            return best, gained
        best, gained = others[index], gained * before / times[index]


def winners(call: Callable[[], Any], times: Times) -> Iterator[str]:
    """Lines to paste: each entry that `call` chooses, as it should be, and what it gains.

    times: seconds with each of some configurations in a place, the others as they were set.
    """
    from uvg_engine.kernels import _configs

    choices = Choices()
    # Autograd would run the backward of a CUDA device in a thread of its own, where nobody answers.
    with _configs.answering(choices), torch.autograd.set_multithreading_enabled(False):
        call()
        for place, default in list(choices.asked.items()):
            best, gained = search(default, lambda configs, place=place: times(choices, place, configs))
            choices.set[place] = best
            name, (capability, *shape) = place
            key = ", ".join([f"SM{capability[0]}{capability[1]}", *map(repr, shape)])
            yield f"{name}: ({key}): {best!r},  # {gained:.2f} times faster than {default!r}"


def tune_op(op: str, size: str, dtype: torch.dtype, clock: Clock) -> Iterator[str]:
    """`winners` of an op's first case, timed on the device."""
    case = cases(op)[0]
    inputs = tuple(_moved(value, clock.device) for value in case.make(SIZES[size], dtype))
    what = BOTH if backends.table("triton")[op].backward else FORWARD
    call = _pass(case.call, inputs, (), what)

    def wrong(got: Any, want: Any) -> str:
        return "" if case.draws else difference(_tensors(got), _tensors(want), SLACK[dtype], case.agree)

    with backends.force("triton"):
        want = call()
        yield from winners(call, lambda *asked: _seconds(clock, call, lambda got: wrong(got, want), *asked))


def _seconds(
    clock: Clock,
    call: Callable[[], Any],
    wrong: Callable[[Any], str],
    choices: Choices,
    place: Place,
    configs: Sequence[Any],
) -> list[float]:
    """Median seconds with each configuration, all in turns; infinite for what does not compile, fit or agree."""

    def under(config: Any) -> Callable[[], Any]:
        def run() -> Any:
            choices.set[place] = config
            return call()

        return run

    fit = {}
    for number, config in enumerate(configs):
        try:
            fault = wrong(under(config)())
        except Exception as error:  # a compiler's or the device's own kinds: told, and left out
            fault = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
        if fault:
            print(f"  {config!r}: {fault}", file=sys.stderr)
        else:
            fit[str(number)] = under(config)
    timings = clock.alternate(fit)
    return [timings[str(number)].median if str(number) in timings else float("inf") for number in range(len(configs))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the winners; returns 1 where there is no GPU to time them on."""
    ops = sorted(backends.table("triton"))
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("op", nargs="*", help=f"out of {', '.join(ops)}; all if none is named")
    parser.add_argument("--size", choices=SIZES, default="1.3b-8192")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each configuration (default 0.2)")
    args = parser.parse_args(arguments)
    if strangers := sorted(set(args.op) - set(ops)):
        parser.error(f"no configuration of {', '.join(strangers)} is searched; have {', '.join(ops)}")
    if not torch.cuda.is_available():
        print(f"tune: torch {torch.__version__} sees no GPU here, and a configuration is chosen by its time on one")
        return 1
    print(f"# {torch.cuda.get_device_name()}, {torch.__version__}, size {args.size}, {args.dtype}")
    for op in args.op or ops:
        for line in tune_op(op, args.size, DTYPES[args.dtype], Clock("cuda", seconds=args.seconds)):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

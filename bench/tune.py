"""Search better configurations of the Triton kernels on a real GPU, offline, and print them to be pasted.

For each choice that an op's config function makes at this size, its neighbours are timed in turns with the default; the
winners of a field are combined until nothing gains. Nothing here runs at import of the library: what ships stands in
kernels/.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.case import BOTH, FORWARD, SIZES
from bench.one_case import _pass, cases
from bench.timing import Clock
from uvg_engine import backends

CONFIG_FUNCTIONS = {  # op: the function of its kernel module that chooses
    "flash_attention": "attention_config",
    "gated_residual": "row_config",
    "modulated_layer_norm": "row_config",
    "moe_combine": "row_config",
    "moe_dispatch": "row_config",
    "moe_mlp": "gemm_config",
    "qk_norm_rope": "rope_config",
}
LIMITS = {"num_warps": (1, 32), "num_stages": (1, 6)}  # other fields: sizes of a tile
TILE = (1, 512)
GAIN = 1.03  # times faster than before, or it is noise


class Choices:
    """Stands in for a config function: notes what is asked, and answers with what was set for it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.asked: dict[str, Any] = {}
        self.set: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        told = [*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())]
        key = f"{self.function.__name__}({', '.join(told)})"
        self.asked[key] = self.function(*args, **kwargs)
        return self.set.get(key, self.asked[key])


def neighbours(config: Any) -> Iterator[Any]:
    """Configurations that differ in one field: half and double of a size, one stage more or less, the other truth."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            others: tuple[Any, ...] = (not value,)
        elif field.name == "num_stages":
            others = (value - 1, value + 1)
        else:
            others = (value // 2, 2 * value)
        low, high = LIMITS.get(field.name, TILE)
        for other in others:
            # a size that follows from the shape (a whole row) is above TILE and is left alone
            if isinstance(other, bool) or (low <= other <= high and value <= high):
                yield dataclasses.replace(config, **{field.name: other})


def search(default: Any, seconds: Callable[[Sequence[Any]], Sequence[float]]) -> tuple[Any, float]:
    """(the best configuration found, times faster than the default). seconds: times configurations together."""
    best, gained = default, 1.0
    while True:
        others = list(neighbours(best))
        before, *times = seconds([best, *others])
        index = min(range(len(times)), key=times.__getitem__, default=None)
        if index is None or before / times[index] < GAIN:
            return best, gained
        best, gained = others[index], gained * before / times[index]


def tune_op(op: str, size: str, dtype: torch.dtype, clock: Clock) -> Iterator[str]:
    """Lines to paste: what the config function should answer, and what it gains."""
    module = importlib.import_module(f"uvg_engine.kernels.{op}")
    name = CONFIG_FUNCTIONS[op]
    function = getattr(module, name)
    choices = Choices(function)
    case = cases(op)[0]
    inputs = tuple(x.to(clock.device) if isinstance(x, torch.Tensor) else x for x in case.make(SIZES[size], dtype))
    what = BOTH if backends.table("triton")[op].backward else FORWARD
    call = _pass(case.call, inputs, (), what)
    setattr(module, name, choices)
    try:
        with backends.force("triton"):
            call()
            for key, default in list(choices.asked.items()):
                best, gained = search(default, lambda configs, key=key: _seconds(clock, call, choices, key, configs))
                choices.set[key] = best
                yield f"{key} -> {best!r}  # {gained:.2f} times faster than {default!r}"
    finally:
        setattr(module, name, function)


def _seconds(clock: Clock, call: Callable[[], Any], choices: Choices, key: str, configs: Sequence[Any]) -> list[float]:
    """Median seconds with each configuration, all in turns; infinite for what does not compile or does not fit."""

    def under(config: Any) -> Callable[[], Any]:
        def run() -> Any:
            choices.set[key] = config
            return call()

        return run

    fit = {}
    for place, config in enumerate(configs):
        try:
            under(config)()
            fit[str(place)] = under(config)
        except Exception as error:  # a compiler's or the device's own kinds: told, and left out
            print(f"  {config!r}: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
    timings = clock.alternate(fit)
    return [timings[str(place)].median if str(place) in timings else float("inf") for place in range(len(configs))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the winners; returns 1 where there is no GPU to time them on."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("op", nargs="*", help=f"out of {', '.join(CONFIG_FUNCTIONS)}; all if none is named")
    parser.add_argument("--size", choices=SIZES, default="1.3b-8192")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each configuration (default 0.2)")
    args = parser.parse_args(arguments)
    if strangers := sorted(set(args.op) - set(CONFIG_FUNCTIONS)):
        parser.error(f"no configuration of {', '.join(strangers)} is searched; have {', '.join(CONFIG_FUNCTIONS)}")
    if not torch.cuda.is_available():
        print(f"tune: torch {torch.__version__} sees no GPU here, and a configuration is chosen by its time on one")
        return 1
    print(f"# {torch.cuda.get_device_name()}, {torch.__version__}, size {args.size}, bf16")
    for op in args.op or [op for op in CONFIG_FUNCTIONS if op in backends.table("triton")]:
        for line in tune_op(op, args.size, torch.bfloat16, Clock("cuda", seconds=args.seconds)):
            print(f"{op}: {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Samples and tokens a second end to end, and peak memory: the engine as it is against the plain reference loop.

The plain loop is the same engine with every saving off, on the reference backend; where the first results of the two
differ, that is told in place of a time. Memory as in `bench.memory`: what a call takes beside the weights and the
optimiser's state. Model 1.3b: its widths, --layers blocks of random weights, products in bf16 (a CPU without bf16
instructions wants --dtype fp32), a small vocabulary, pixels in place of the VAE; it is trained on the clips of digits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.memory import alone, extra_memory
from bench.one_case import difference
from bench.timing import Clock, duration, machine, positive
from uvg_engine import Engine, Request, Savings, backends
from uvg_engine.cli._progress import Progress
from uvg_engine.media import HashTextEncoder, PixelCodec, WordTokenizer
from uvg_engine.model import UniViGU, named_config
from uvg_engine.process import keep_freed_memory
from uvg_engine.training import TrainConfig, Trainer

PROMPT = "a red seven moving right , fast"
WAYS = ("uvg", "reference")  # the second: plain
SIDE = {"digits": (8, 32, 32), "1.3b": (8, 128, 160)}  # frames, height, width: 64 and 1,280 video tokens
TEXT = {"digits": 28, "1.3b": 64}
DTYPES = {"digits": "float32", "1.3b": "bfloat16"}  # of the products, unless asked for another
NAMES = {"fp32": "float32", "bf16": "bfloat16"}
SLACK = {"float32": 1e-2, "bfloat16": 0.2}  # of the largest latent or loss: a few steps, with guidance
AGREE = {"float32": 0.9, "bfloat16": 0.0}  # share of equal words: a rounded logit may tip a draw
LINE = dict[str, Any]


def main(job: str, arguments: Sequence[str] | None = None) -> int:
    """The scripts `bench/throughput_<job>.py`: one line per way."""
    parser = argparse.ArgumentParser(description=f"{job}: {__doc__}", formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=SIDE, default="digits")
    parser.add_argument("--layers", type=positive, default=2, help="of model 1.3b (30 in full; default 2)")
    parser.add_argument("--samples", type=positive, default=8, help="in one batch (default 8)")
    parser.add_argument("--steps", type=positive, default=8, help="of the sampler, or of training (default 8)")
    parser.add_argument("--dtype", choices=NAMES, help="of the products (default: fp32 for digits, bf16 for 1.3b)")
    parser.add_argument("--seconds", type=duration, default=10.0, help="for each way (default 10)")
    parser.add_argument("--threads", type=positive, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(arguments)
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    about, clock = machine(), Clock(seconds=args.seconds, min_rounds=3)
    if not args.json:
        print("  ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    dtype = NAMES[args.dtype] if args.dtype else None
    if (dtype or DTYPES[args.model]) == "bfloat16" and not _multiplies_bf16():
        print("note: no bf16 instructions here: a call may take minutes; --dtype fp32 is faster", file=sys.stderr)
    wrong = False
    for line in lines(job, args.model, args.layers, args.samples, args.steps, clock, dtype):
        wrong |= "wrong" in line
        print(json.dumps(line | about) if args.json else _text(line), flush=True)
    return int(wrong)


def _multiplies_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _text(line: LINE) -> str:
    head = f"{line['op']} {line['case']:6} {line['shape']:32} {line['dtype']:8} {line['backend']:10}"
    if "wrong" in line:
        return f"{head} wrong: {line['wrong']}"
    told = [f"{line['ms']:9.1f} ms +-{line['spread']:4.0%}", f"{line['samples_per_second']:8.3f} samples/s"]
    told += [f"{line['tokens_per_second']:9.0f} tokens/s", f"{line['extra_mb']:6.0f} MB"]
    return "  ".join([head, *told, *(f"{ratio:.2f} x {other}" for other, ratio in line["times_faster"].items())])


def lines(
    job: str, model: str, layers: int, samples: int, steps: int, clock: Clock, dtype: str | None = None
) -> Iterator[LINE]:
    """One line per way of doing a job ("generate", "caption", "joint" or "train")."""
    dtype = dtype or DTYPES[model]
    given = (job, model, layers, samples, steps, dtype)
    first: dict[str, Any] = {}
    with Progress(f"throughput {job}", unit="calls", lines=True) as bar:
        timings = clock.alternate({way: _counted(make(way, *given), way, bar, first) for way in WAYS})
    wrong = difference(*(_values(first[way]) for way in WAYS), SLACK[dtype], AGREE[dtype])
    data = "digits" if job == "train" else model
    frames, height, width = SIDE[data]
    tokens = samples * steps * (frames // 2 * height // 8 * width // 8 + TEXT[data])
    shape = f"{samples} x {frames}x{height}x{width}, {steps} steps" + (f", {layers} layers" if model == "1.3b" else "")
    for way, timing in timings.items():
        line = {"op": f"throughput {job}", "case": model, "shape": shape, "pass": "end to end", "backend": way}
        line |= {"dtype": dtype}
        if wrong and way == "uvg":
            yield line | {"wrong": wrong}
            continue
        line |= {"ms": timing.median * 1e3, "spread": timing.spread, "rounds": len(timing.rounds)}
        line |= {"samples_per_second": samples * (steps if job == "train" else 1) / timing.median}
        line |= {"tokens_per_second": tokens / timing.median}
        line["extra_mb"] = alone("bench.throughput", "memory", torch.get_num_threads(), way, *given)
        faster = {"reference": timing.times_faster_than(timings["reference"])} if way == "uvg" else {}
        yield line | {"times_faster": faster}


def _counted(call: Callable[[], Any], way: str, bar: Progress, first: dict[str, Any]) -> Callable[[], None]:
    """The call, told to who waits; its first result is kept."""

    def counted() -> None:
        result = call()
        first.setdefault(way, result)
        bar.advance(note=way)

    return counted


def _values(results: Sequence[Any]) -> tuple[Tensor, ...]:
    """Latents and words of an engine's results, losses of training steps (NaN where a stream has none)."""
    latents = [result.latent.flatten() for result in results if hasattr(result, "latent")]
    words = [torch.tensor(result.tokens) for result in results if hasattr(result, "tokens")]
    losses = [torch.tensor([log["video"], log["text"]]).nan_to_num() for log in results if isinstance(log, dict)]
    return tuple(torch.cat(parts) for parts in (latents, words, losses) if parts)


def memory(threads: int, way: str, *given: Any) -> float:
    """MB of one call, in this process."""
    torch.set_num_threads(threads)
    return extra_memory(make(way, *given))


def make(way: str, job: str, model: str, layers: int, samples: int, steps: int, dtype: str) -> Callable[[], Any]:
    """The job as a call."""
    plain = way == "reference"
    inner = (
        training(model, layers, samples, steps, dtype)
        if job == "train"
        else sampling(job, model, layers, samples, steps, dtype, plain)
    )

    def call() -> Any:
        with backends.force("reference") if plain else contextlib.nullcontext():
            return inner()

    return call


def sampling(job: str, model: str, layers: int, samples: int, steps: int, dtype: str, plain: bool) -> Callable[[], Any]:
    """Engine runs of `samples` requests, with every saving unless `plain`."""
    savings = Savings.none() if plain else Savings()
    if model == "digits":
        engine = Engine.from_pretrained("digits", compute_dtype=getattr(torch, dtype), savings=savings)
    else:
        torch.manual_seed(0)
        config = named_config("1.3b", layers=layers, vocab=4096, in_channels=24)
        tokenizer, encoder = WordTokenizer(dict.fromkeys(PROMPT.split())), HashTextEncoder(config.text_dim, 512)
        frames, height, width = SIDE[model]
        defaults = {"frames": frames, "height": height, "width": width, "text_length": TEXT[model]}
        network = UniViGU(config).to(getattr(torch, dtype)).eval()
        engine = Engine(network, PixelCodec((2, 4, 4), (2, 2, 2)), tokenizer, encoder, defaults, savings=savings)
    requests = [_request(job, seed, steps, SIDE[model]) for seed in range(samples)]
    return lambda: engine.run(requests)


def _request(job: str, seed: int, steps: int, size: tuple[int, int, int]) -> Request:
    if job != "caption":
        return Request(job, PROMPT, seed=seed, num_steps=steps)
    gen = torch.Generator().manual_seed(seed)
    video: Tensor = torch.randint(256, (*size, 3), generator=gen, dtype=torch.uint8)
    return Request(job, video=video, seed=seed, num_steps=steps)


def training(model: str, layers: int, samples: int, steps: int, dtype: str) -> Callable[[], Any]:
    """`steps` optimiser steps of the stage with captions; the data are the digits, so a sample has 64 video tokens."""
    sizes = {"heads": 4, "head_dim": 32, "text_dim": 64, "freq_dim": 64, "ffn_dim": 512, "layers": 6}
    if model == "1.3b":
        sizes = {"heads": 12, "head_dim": 128, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960, "layers": layers}
    config = TrainConfig.from_dict(
        {
            "model": sizes,
            "data": {"type": "digits"},
            "codec": {"type": "pixel", "block": [2, 4, 4], "keep": [2, 2, 2]},
            "text_encoder": {"type": "hash", "text_dim": sizes["text_dim"], "max_len": 16},
            "batch_size": samples,
            "text_length": TEXT["digits"],
            "dtype": dtype,
            "stages": [{"name": "refine", "text": "caption", "steps": 10**6, "lr": 1e-4}],
        }
    )
    folder = tempfile.mkdtemp(prefix="uvg-bench-")
    trainer = Trainer(config, folder)
    weakref.finalize(trainer, shutil.rmtree, folder, ignore_errors=True)
    return lambda: [trainer.train_step() for _ in range(steps)]

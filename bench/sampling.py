"""The engine end to end: many requests packed together against the same requests one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.one_case import Line
from bench.timing import Clock
from uvg_engine import Engine, Request
from uvg_engine.media import HashTextEncoder, PixelCodec, WordTokenizer
from uvg_engine.model import CONFIGS, UniViGU

PROMPT = "a red seven moving right , fast"
FRAMES, SIDE = 8, 32


def bench_sampling(clock: Clock, num_requests: int, num_steps: int) -> list[Line]:
    """Lines of requests/s for each job, with random weights: the embedded model's sizes cost what its weights do."""
    engine = _engine(clock.device)
    lines: list[Line] = []
    for kind in ("generate", "caption", "joint"):
        requests = [_request(kind, seed, num_steps) for seed in range(num_requests)]
        ways: dict[str, Callable[[], Sequence[Any]]] = {
            "batched": lambda requests=requests: engine.run(requests),
            "one by one": lambda requests=requests: [engine.run([request])[0] for request in requests],
        }
        if _bits(ways["batched"]()) != _bits(ways["one by one"]()):
            raise SystemExit(f"{kind}: a request's result depends on its neighbours")
        timings = clock.alternate(ways)
        ratio = timings["batched"].times_faster_than(timings["one by one"])
        shape = f"{num_requests} x {FRAMES}x{SIDE}x{SIDE}, {num_steps} steps"
        for name, timing in timings.items():
            line = {"op": f"sampling {kind}", "shape": shape, "dtype": "float32", "pass": "end to end", "backend": name}
            line |= {"ms": timing.median * 1e3, "spread": timing.spread, "rounds": len(timing.rounds)}
            faster = {"one by one": ratio} if name == "batched" else {}
            lines.append(line | {"requests_per_second": num_requests / timing.median, "times_faster": faster})
    return lines


def _engine(device: str) -> Engine:
    torch.manual_seed(0)
    model = UniViGU(CONFIGS["digits"]).to(device).eval()
    defaults = {"frames": FRAMES, "height": SIDE, "width": SIDE, "text_length": 28, "source": "mask"}
    tokenizer = WordTokenizer(dict.fromkeys(PROMPT.split()))
    return Engine(model, PixelCodec((2, 4, 4), (2, 2, 2)), tokenizer, HashTextEncoder(64, 16), defaults)


def _request(kind: str, seed: int, num_steps: int) -> Request:
    if kind != "caption":
        return Request(kind, PROMPT, seed=seed, num_steps=num_steps)
    gen = torch.Generator().manual_seed(seed)
    video = torch.randint(256, (FRAMES, SIDE, SIDE, 3), generator=gen, dtype=torch.uint8)
    return Request(kind, video=video, seed=seed, num_steps=num_steps)


def _bits(results: Sequence[Any]) -> list[Any]:
    found = [vars(result).get(name) for result in results for name in ("frames", "latent", "tokens")]
    return [value.cpu().numpy().tobytes() if isinstance(value, Tensor) else value for value in found]

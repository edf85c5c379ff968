"""`uvg caption`: from video files to sentences."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from uvg_engine.cli import _options as opt
from uvg_engine.cli._files import pictures, print_json
from uvg_engine.cli._progress import Progress
from uvg_engine.cli.generate import _SHOWN_STEPS, save_trajectory


def caption(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Video files of any size and length.")],
    model: opt.Model = "digits",
    steps: opt.Steps = None,
    text_rule: opt.TextRule = None,
    temperature: opt.Temperature = None,
    seed: opt.Seed = None,
    size: opt.Size = None,
    trajectory: opt.Trajectory = None,
    json: opt.Json = False,
    precision: opt.Precision = "full",
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
) -> None:
    """Tell what each video shows."""
    drawn = pictures(trajectory, len(files), taken=files)
    own: dict[str, Any] = {
        "num_steps": steps,
        "text_rule": text_rule,
        "temperature": temperature,
        **opt.parse_size(size),
    }
    engine = opt.load_engine(model, device, threads, precision)
    start = time.perf_counter()
    with Progress("caption", unit="steps") as bar:
        own |= {"seeds": seed, "trajectory": _SHOWN_STEPS if trajectory else False}
        results = engine.caption(list(files), callback=bar.sampling(len(files)), **own)
    seconds = time.perf_counter() - start
    told = []
    for result, file, picture in zip(results, files, drawn, strict=True):
        save_trajectory(result.trajectory, picture)
        entry = {"file": str(file), "text": result.text, "seed": result.seed}
        told.append(entry | ({"trajectory": str(picture)} if picture else {}))
    if json:
        print_json({"job": "caption", "model": model, "seconds": round(seconds, 3), "results": told})
        return
    for entry in told:
        print(entry["text"] if len(told) == 1 else f"{entry['file']}: {entry['text']}")

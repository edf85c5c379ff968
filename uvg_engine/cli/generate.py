"""`uvg generate` and `uvg joint`: from a sentence to a video file, and to a video file with its caption."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from uvg_engine.cli import _options as opt
from uvg_engine.cli._files import VIDEO_SUFFIXES, numbered, pictures, print_json
from uvg_engine.cli._notes import note
from uvg_engine.cli._progress import Progress

_SHOWN_STEPS = 12  # rows of a trajectory picture
Prompts = Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to see, one sentence a video.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help=".mp4, .gif or .png (frames side by side). Several: numbered.")
]


def generate(
    prompts: Prompts,
    output: Output,
    model: opt.Model = "digits",
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    shift: opt.Shift = None,
    solver: opt.Solver = None,
    seed: opt.Seed = None,
    size: opt.Size = None,
    fps: opt.Fps = None,
    trajectory: opt.Trajectory = None,
    json: opt.Json = False,
    precision: opt.Precision = "full",
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
) -> None:
    """Make a video from each prompt."""
    own = {"num_steps": steps, "guidance": guidance, "shift": shift, "solver": solver, **opt.parse_size(size)}
    _sample("generate", prompts, output, fps, model, seed, trajectory, json, precision, device, threads, own)


def joint(
    prompts: Prompts,
    output: Output,
    model: opt.Model = "digits",
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    shift: opt.Shift = None,
    solver: opt.Solver = None,
    text_rule: opt.TextRule = None,
    temperature: opt.Temperature = None,
    seed: opt.Seed = None,
    size: opt.Size = None,
    fps: opt.Fps = None,
    trajectory: opt.Trajectory = None,
    json: opt.Json = False,
    precision: opt.Precision = "full",
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
) -> None:
    """Make a video and its detailed caption in one process, from each prompt."""
    own = {"num_steps": steps, "guidance": guidance, "shift": shift, "solver": solver, **opt.parse_size(size)}
    own |= {"text_rule": text_rule, "temperature": temperature}
    _sample("joint", prompts, output, fps, model, seed, trajectory, json, precision, device, threads, own)


def _sample(
    kind: str,
    prompts: Sequence[str],
    output: Path,
    fps: float | None,
    model: str,
    seed: int | None,
    trajectory: Path | None,
    json: bool,
    precision: str,
    device: str,
    threads: int | None,
    own: dict[str, Any],
) -> None:
    """Check the names, run the job, write the files, tell what there is."""
    from uvg_engine.media import write_video
    from uvg_engine.media.video import check_fps

    files = numbered(output, len(prompts), VIDEO_SUFFIXES, "--output")
    drawn = pictures(trajectory, len(prompts), taken=files)
    if fps is not None and output.suffix.lower() == ".png":
        raise ValueError(f"--fps must go with a .mp4 or .gif, got {output}")
    if fps is not None:
        check_fps(fps)
    if not all(prompt.strip() for prompt in prompts):
        note("an empty prompt asks for nothing, so anything may come")
    engine = opt.load_engine(model, device, threads, precision)
    rate = engine.defaults.fps if fps is None else fps
    start = time.perf_counter()
    with Progress(kind, unit="steps") as bar:
        own |= {"seeds": seed, "trajectory": _SHOWN_STEPS if trajectory else False}
        results = getattr(engine, kind)(list(prompts), callback=bar.sampling(len(prompts)), **own)
    seconds = time.perf_counter() - start
    told = []
    for result, file, picture in zip(results, files, drawn, strict=True):
        write_video(file, result.frames, rate)
        save_trajectory(result.trajectory, picture)
        frames, height, width = result.frames.shape[:3]
        entry = {"prompt": result.prompt, "file": str(file), "seed": result.seed, "fps": rate}
        entry |= {"frames": frames, "height": height, "width": width}
        entry |= {"text": result.text} if kind == "joint" else {}
        told.append(entry | ({"trajectory": str(picture)} if picture else {}))
    if json:
        print_json({"job": kind, "model": model, "seconds": round(seconds, 3), "results": told})
        return
    for entry in told:
        if kind == "joint":
            print(entry["text"])
        print(f"{entry['file']}: {entry['frames']} frames of {entry['width']}x{entry['height']}, seed {entry['seed']}")


def save_trajectory(trajectory: Any, picture: Path | None) -> None:
    """The recorded steps as one picture; nothing where none was asked for."""
    if picture is None:
        return
    from uvg_engine.media import save_png, trajectory_picture

    save_png(picture, trajectory_picture(trajectory.frames, trajectory.texts, trajectory.labels))

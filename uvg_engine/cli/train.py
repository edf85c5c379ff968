"""`uvg train` and `uvg export`: from a training file to a run's folder, and from that to a model's folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uvg_engine.cli import _options as opt
from uvg_engine.cli._files import print_json
from uvg_engine.cli._progress import Progress

if TYPE_CHECKING:
    from uvg_engine.training import Trainer


def train(
    config: Annotated[Path, typer.Option("--config", "-c", help="A training file, such as configs/digits.yaml.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's newest checkpoint.")] = False,
    stop_at: Annotated[int | None, typer.Option(min=1, help="Stop after this step; --resume goes on.")] = None,
    json: opt.Json = False,
    threads: opt.Threads = None,
) -> None:
    """Train a model; the folder holds checkpoints, log.jsonl, TensorBoard files and at the end the model."""
    from importlib.util import find_spec

    opt.set_threads(threads)
    from uvg_engine.sampling import EngineDefaults
    from uvg_engine.training.config import TrainConfig
    from uvg_engine.training.loop import Trainer
    from uvg_engine.training.publish import engine_defaults
    from uvg_engine.training.state import checkpoints

    if find_spec("tensorboard") is None:
        raise ValueError("uvg train needs the package tensorboard: pip install 'uvg-engine[train]'")
    settings = TrainConfig.from_yaml(config)
    EngineDefaults.from_dict(engine_defaults(settings))  # its errors now, not after the last step
    trainer = Trainer(settings, output, resume=resume)
    chief = trainer.rank == 0
    if chief and not json:
        parameters = sum(p.numel() for p in trainer.model.parameters())
        print(f"{parameters:,} parameters, {settings.total_steps} steps, from step {trainer.step}", file=sys.stderr)
        if trainer.step in (stop_at, settings.total_steps):
            print(f"nothing is left to train: the run has reached step {trainer.step}", file=sys.stderr)
    try:
        if chief:
            with Progress(trainer.stage.name, settings.total_steps, done=trainer.step, unit="") as bar:
                trainer.run(lambda step, log: _show(bar, trainer, log), stop_at)
        else:
            trainer.run(stop_at=stop_at)
    except KeyboardInterrupt:
        if chief:
            found = checkpoints(output / "checkpoints")
            place = found[-1].name if found else "step 0, there is no checkpoint yet"
            print(f"at step {trainer.step}; the same command with --resume goes on from {place}", file=sys.stderr)
        raise
    if chief:
        folder = publish(trainer, output / "model")
        _tell(folder, trainer.step, settings.total_steps, json)


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder (also one still training) or one of its checkpoints.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The model's folder.")],
    ema: Annotated[bool, typer.Option(help="The averaged weights, or the last ones.")] = True,
    json: opt.Json = False,
) -> None:
    """Make a model folder from the newest checkpoint of a run."""
    from uvg_engine.training.publish import find_checkpoint

    checkpoint = find_checkpoint(run)
    folder = publish(checkpoint, output, ema=ema)
    if json:
        print_json({"model": str(folder), "checkpoint": str(checkpoint), "ema": ema})
    else:
        print(f"{folder}: the model of {checkpoint}")


def publish(source: Trainer | Path, folder: Path, *, ema: bool = True) -> Path:
    """Engine.save_pretrained of a trainer, run or checkpoint; returns the folder."""
    from uvg_engine.sampling import Engine
    from uvg_engine.training.publish import engine_parts

    Engine(**engine_parts(source, ema=ema)).save_pretrained(folder)
    return folder


def _show(bar: Progress, trainer: Trainer, log: dict[str, float]) -> None:
    bar.label = trainer.stage.name
    losses = ", ".join(f"{name} {log[name]:.4f}" for name in ("video", "text") if log[name] == log[name])
    bar.advance(note=f"{losses}, {log['samples_per_s']:.0f} samples/s")


def _tell(folder: Path, step: int, total: int, json: bool) -> None:
    if json:
        print_json({"model": str(folder), "step": step, "total_steps": total})
        return
    print(f"{folder}: the model at step {step} of {total}. Try it:")
    print(f'  uvg generate "a red seven moving right, fast" -o seven.mp4 --model {folder}')
    print(f"  uvg caption seven.mp4 --model {folder}")
    print(f"  uvg eval --model {folder}")

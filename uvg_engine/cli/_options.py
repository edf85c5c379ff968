"""Options that several commands share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from uvg_engine.sampling import Engine

Model = Annotated[str, typer.Option("--model", "-m", help="A model of the package by name, or a folder with one.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Sampling steps; default: the model's own.")]
Guidance = Annotated[float | None, typer.Option(help="How strongly the prompt counts; 1 is no guidance.")]
Shift = Annotated[float | None, typer.Option(help="Above 1: more of the steps at high noise.")]
Solver = Annotated[str | None, typer.Option(help="euler or unipc.")]
TextRule = Annotated[str | None, typer.Option(help="How tokens change: euler, exact or progress.")]
Temperature = Annotated[float | None, typer.Option(help="Of the text; 0 takes the likeliest words.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same bits; the n-th input has seed + n.")]
Size = Annotated[str | None, typer.Option(help="FRAMESxHEIGHTxWIDTH in pixels; default: the model's own.")]
Fps = Annotated[float | None, typer.Option(help="Frames a second of the .mp4 or .gif; default: the model's own.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Trajectory = Annotated[Path | None, typer.Option(help="A .png that shows how noise became the result.")]
Precision = Annotated[str, typer.Option(help="full, or int8: the blocks' products in bytes, faster and less exact.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads; default: as torch finds.")]


def set_threads(threads: int | None) -> None:
    """Limit torch's CPU threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def load_engine(model: str, device: str, threads: int | None, precision: str) -> Engine:
    """The engine of these options. Raises ValueError on a device or a model that is not there."""
    import torch

    from uvg_engine.sampling import Engine
    from uvg_engine.sampling.engine import PRECISIONS

    set_threads(threads)
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch can use, found none (uvg doctor tells more)")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device must be one of the {torch.cuda.device_count()} GPUs, got {device!r}")
    if precision not in PRECISIONS or (precision != "full" and chosen.type != "cpu"):
        raise ValueError(f"--precision must be full, or int8 on the CPU, got {precision!r}")
    try:
        return Engine.from_pretrained(model, device=chosen, precision=precision)
    except ValueError as error:
        raise ValueError(f"--model {model}: {error}") from error


def parse_size(size: str | None) -> dict[str, int]:
    """'8x32x32' as {frames, height, width}; {} for None. Raises ValueError on another form."""
    if size is None:
        return {}
    parts = size.lower().split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--size must be FRAMESxHEIGHTxWIDTH, such as 8x32x32, got {size!r}")
    return dict(zip(("frames", "height", "width"), map(int, parts), strict=True))

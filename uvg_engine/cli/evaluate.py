"""`uvg eval`: what a model reaches on held-out handwriting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from uvg_engine.cli import _options as opt
from uvg_engine.cli._files import print_json
from uvg_engine.cli._progress import Progress

if TYPE_CHECKING:
    from uvg_engine.evaluation import Evaluation, Share

_FOUR = ("digit", "color", "direction", "speed", "all")
_ROWS = (  # measure, its name for people, fields
    ("caption", "caption: text against clip", (*_FOUR, "start", "end", "bounces")),
    ("generate", "generate: video against prompt", _FOUR),
    ("joint", "joint: text against own video", ("agreement",)),
    ("joint", "joint: video against prompt", _FOUR),
)
_NAMES = {"all": "these four at once", "agreement": "digit, color, direction agree"}
_LEGEND = """\
all: with Wilson's 95 % interval. seen, unseen: whether training showed this
combination of digit, color and direction. real: the held-out clips themselves
in the eyes of the judge, the most that a video could score."""


def evaluate(
    model: opt.Model = "digits",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Clips, and as many prompts.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Other seeds, other clips and other noise.")] = 0,
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips given to the model at once; changes no result.")] = 50,
    json: opt.Json = False,
    precision: opt.Precision = "full",
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
) -> None:
    """Measure captions, videos and both on held-out handwriting, half of it in combinations never trained on."""
    engine = opt.load_engine(model, device, threads, precision)
    from uvg_engine.evaluation import evaluate as measure

    with Progress("eval", unit="steps") as bar:
        settings: dict[str, Any] = {"seed": seed, "num_steps": steps, "guidance": guidance, "batch_size": batch}
        result = measure(engine, limit, **settings, progress=bar.show)
    if json:
        print_json(result.to_dict())
    else:
        _print_table(result, model)


def _print_table(result: Evaluation, model: str) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model} on {result.n} held-out clips and their prompts", box=SIMPLE, pad_edge=False)
    table.add_column("percent right", no_wrap=True)
    for name in ("all", "95 %", "seen", "unseen", "real"):
        table.add_column(name, justify="right", no_wrap=True)
    for measure, title, fields in _ROWS:
        table.add_row(title, style="bold")
        for field in fields:
            share = result.share(measure, field)
            low, high = share.interval()
            parts = [_percent(result.share(measure, field, seen=seen)) for seen in (True, False)]
            ceiling = _percent(result.share("judge", field)) if field in result.marks["judge"] else ""
            table.add_row(
                f"  {_NAMES.get(field, field)}", _percent(share), f"{100 * low:.1f}-{100 * high:.1f}", *parts, ceiling
            )
        table.add_section()
    console = Console(markup=False, highlight=False)  # a folder's name may look like markup
    console.print(table)
    console.print(_LEGEND)


def _percent(share: Share) -> str:
    return f"{100 * share.value:.1f}" if share.total else "-"

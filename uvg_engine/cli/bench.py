"""`uvg bench`: the benchmark of a checkout."""

from __future__ import annotations

from pathlib import Path

import typer

ARGUMENTS = typer.Argument(None, help="Of `python -m bench`; `uvg bench -- --help` lists them.")


def bench(context: typer.Context, arguments: list[str] = ARGUMENTS) -> None:
    """Time the ops, a block and sampling against their peers. Needs a checkout: the benchmark is in no wheel.

    Peers that are not installed are told and left out; the extras bench and wan bring them.
    """
    import runpy
    import sys

    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "__main__.py").is_file():
        raise ValueError(
            f"uvg bench must run from a checkout of uvg-engine (`pip install -e .`), got an installation in {root}"
        )
    sys.path.insert(0, str(root))
    sys.argv = ["uvg bench", *context.args, *(arguments or [])]
    runpy.run_module("bench", run_name="__main__", alter_sys=True)

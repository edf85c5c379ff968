"""Where results go: checked before the work starts, so that no long run ends in a wrong file name."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VIDEO_SUFFIXES = (".mp4", ".gif", ".png")


def numbered(path: Path, count: int, suffixes: tuple[str, ...], option: str, taken: Sequence[Path] = ()) -> list[Path]:
    """`count` paths: the one given, or with -1, -2, ... before its suffix.

    taken: files that the command writes or reads besides. Raises ValueError on one of these, another suffix, a folder
    in its place, or a folder that is not there or cannot be written to.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} must end in {', '.join(suffixes)}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{option} must lie in a folder that exists, got {path}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option} must lie in a folder that can be written to, got {path}")
    others = {other.resolve() for other in taken}
    paths = [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(1, count + 1)]
    for each in paths:
        if each.is_dir():
            raise ValueError(f"{option} must be a file, got the folder {each}")
        if each.resolve() in others:
            raise ValueError(f"{option} must be a file of its own, got {each}")
    return paths


def pictures(path: Path | None, count: int, taken: Sequence[Path]) -> list[Path | None]:
    """The files of --trajectory, `numbered`; Nones where it was not given."""
    return [None] * count if path is None else [*numbered(path, count, (".png",), "--trajectory", taken)]


def print_json(document: Any) -> None:
    """The one document of --json, which stays json whatever stdout can hold."""
    utf8 = "utf" in (sys.stdout.encoding or "").lower()
    print(json.dumps(document, indent=2, ensure_ascii=not utf8))

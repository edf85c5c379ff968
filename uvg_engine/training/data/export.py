"""Writes clips of the digits data set as mp4 files with a `metadata.jsonl`: the form that FolderDataset reads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from uvg_engine.media.video import write_video

from .digits import DigitsDataset
from .folder import METADATA

_CHUNK = 64  # clips painted at a time


def export(
    split: str,
    count: int,
    out_dir,
    seed: int = 0,
    *,
    augment: bool = False,
    combinations: str | None = None,
    scale: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Samples 0..count-1 of the split as files; the folder appears whole or not at all. Returns the folder.

    out_dir: must not exist, or be empty. augment, combinations: as in DigitsDataset. scale: as in write_video;
    None enlarges so that players show more than a stamp. progress(done, count) is called after every clip.
    ValueError for a bad argument.
    """
    out_dir = Path(out_dir)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"out_dir must be a new or empty folder, got {out_dir}")
    data = DigitsDataset(split, seed, augment=augment, combinations=combinations, size=count)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        _write(data, building, scale, progress)
        building.chmod(0o755)  # mkdtemp's own is private to the user
        os.replace(building, out_dir)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return out_dir


def _write(data: DigitsDataset, folder: Path, scale: int | None, progress) -> None:
    done = 0
    with open(folder / METADATA, "w", encoding="utf-8") as metadata:
        for first in range(0, len(data), _CHUNK):
            batch = data.batch(range(first, min(first + _CHUNK, len(data))))
            for frames, prompt, caption, attrs in zip(*batch.values(), strict=True):
                name = f"{done:06d}.mp4"
                write_video(folder / name, frames, data.fps, scale=scale)
                record = {"file": name, "prompt": prompt, "caption": caption, "attrs": attrs.to_dict()}
                metadata.write(json.dumps(record) + "\n")
                done += 1
                if progress is not None:
                    progress(done, len(data))

"""Training checkpoints: everything a run needs to go on bitwise, written atomically, read without pickle."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from uvg_engine.files import replacing

_NAME = re.compile(r"step_(\d{8})\.pt")
_KEYS = {"config", "step", "model", "ema", "ema_updates", "optimizer", "codec", "tokenizer", "rng"}


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write step_XXXXXXXX.pt by way of a temporary name and fsync, then drop the oldest beyond `keep`.

    A kill at any moment leaves the previous checkpoints whole; what a killed writer left is removed here. Raises
    OSError where the disk does not take it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step_*.tmp"):
        left.unlink()
    path = folder / f"step_{step:08d}.pt"
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        raise OSError(f"{path} must be writable, got {type(error).__name__}: {error}") from error
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with weights_only. Raises ValueError on a file that is none or is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself compares no checksums
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"{broken} differs from its checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own words advise to trust the file
        raise ValueError(f"{path} must hold tensors and plain values only, got other objects") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no message')}"
        raise ValueError(f"{path} must be a whole checkpoint of uvg train, got {reason}") from error
    missing = sorted(_KEYS - set(saved)) if isinstance(saved, dict) else sorted(_KEYS)
    if missing:
        raise ValueError(f"{path} must be a checkpoint of uvg train, got one without {', '.join(missing)}")
    return saved


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run, None where there is none.

    Raises ValueError on a damaged one, naming what to delete: older work is never taken up silently.
    """
    found = checkpoints(folder)
    if not found:
        return None
    try:
        return load_checkpoint(found[-1])
    except ValueError as error:
        before = f"go on from {found[-2].name}" if len(found) > 1 else "start again"
        raise ValueError(f"{error}; delete it to {before}") from error

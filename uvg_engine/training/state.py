"""Training checkpoints: everything a run needs to go on bitwise, written atomically, read without pickle."""

from __future__ import annotations

import contextlib
import errno
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from uvg_engine.files import replacing

_NAME = re.compile(r"step_(\d{8})\.pt")
_KEYS = {"config", "step", "model", "ema", "ema_updates", "optimizer", "codec", "tokenizer", "rng"}
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within it no other process may train in this folder, which is made. A claim ends with its process at the latest.

    Raises ValueError where another process trains there, OSError where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"output folder must not be that of a run still training, got {folder}") from error
        except (ModuleNotFoundError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            _log.warning("%s: no locks here; take care that no second process trains in it", folder)
        yield


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


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("step_"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with weights_only. Raises ValueError on a file that is none or is damaged, OSError where it
    cannot be read."""
    with open(path, "rb"):  # what keeps it from being opened says nothing of what is in it
        pass
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself compares no checksums
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"{broken} differs from its checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own words advise to trust the file
        raise ValueError(f"{path} must hold tensors and plain values only, got other objects") from error
    except Exception as error:
        if _is_of_the_machine(error):
            raise
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no message')}"
        raise ValueError(f"{path} must be a whole checkpoint of uvg train, got {reason}") from error
    missing = sorted(_KEYS - set(saved)) if isinstance(saved, dict) else sorted(_KEYS)
    if missing:
        raise ValueError(f"{path} must be a checkpoint of uvg train, got one without {', '.join(missing)}")
    return saved


def _is_of_the_machine(error: Exception) -> bool:
    """Whether memory or disk failed, not the file: it must not be called damaged, for that ends in its deletion."""
    if isinstance(error, OSError):
        return error.errno != errno.EINVAL  # zipfile seeks to where a damaged file sends it
    return isinstance(error, MemoryError) or "allocate memory" in str(error)  # torch: a RuntimeError


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

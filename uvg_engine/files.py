"""Write a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

_LETTERS = 40  # of a file's name, in the temporary one: with all of them it may be too long for the system


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the same folder that takes path's place when the block ends, or is removed if it raises.

    Any number of threads and processes may write one path at a time; the last one stays. After the block the file and
    its name are on the disk, with the permissions of the file that was there, or those that the umask leaves a new one.
    Raises OSError where the folder does not take it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:_LETTERS]}.{secrets.token_hex(8)}.tmp")
    readers = 0o600 if path.exists() else 0o666  # not more, while it is written, than may read the file
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, readers))
    try:
        mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
        yield temporary
        _to_disk(temporary)
        temporary.chmod(mode)  # safetensors makes its files anew, 0600
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # where a folder can be opened
        _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

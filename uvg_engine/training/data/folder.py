"""A user's folder of clips as a data set: video files beside a `metadata.jsonl`.

One JSON object a line: {"file": "clips/a.mp4", "prompt": "...", "caption": "..."}; without a caption the prompt serves
as one. The same interface as DigitsDataset. Everything but the pixels is checked when the folder is opened.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import Any

import torch

from uvg_engine.media.video import read_video, resize_video

from .digits import DigitAttrs, Sample

METADATA = "metadata.jsonl"
DEFAULT_CLIP_SHAPE = (8, 32, 32)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    path: Path
    prompt: str
    caption: str
    attrs: DigitAttrs | None


def _text(record: dict, field: str, where: str, default: str | None = None) -> str:
    value = record.get(field, default)
    if not isinstance(value, str) or not value.strip():
        found = f"{value!r}" if field in record else "no such field"
        raise ValueError(f"{where}: {field!r} must be a text that is not empty, got {found}")
    return value


def _attrs(record: dict) -> DigitAttrs | None:
    """The attributes as `export` writes them, else None."""
    value = record.get("attrs")
    if not isinstance(value, dict) or set(value) != {field.name for field in fields(DigitAttrs)}:
        return None
    return DigitAttrs(**value)


def _entry(root: Path, line: str, where: str) -> _Entry:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: must be one JSON object, got {line.strip()[:60]!r} ({error.msg})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be one JSON object, got {type(record).__name__}")
    name = _text(record, "file", where)
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise ValueError(f"{where}: 'file' must be a path inside the folder, got {name!r}")
    if not (root / name).is_file():
        raise ValueError(f"{where}: 'file' must exist in {root}, got {name!r}")
    prompt = _text(record, "prompt", where)
    return _Entry(root / name, prompt, _text(record, "caption", where, default=prompt), _attrs(record))


def read_metadata(root: Path) -> list[_Entry]:
    """The checked lines of a folder's metadata file. ValueError names the line, or says that there is no video."""
    if not root.is_dir():
        raise ValueError(f"folder must be an existing directory, got {root}")
    metadata = root / METADATA
    if not metadata.is_file():
        raise ValueError(f"folder must hold a {METADATA}, got {root} without one")
    try:
        lines = metadata.read_text(encoding="utf-8-sig").split("\n")  # splitlines also cuts at U+2028 inside a text
    except UnicodeDecodeError as error:
        raise ValueError(f"{METADATA} must be UTF-8 text, got byte {error.start} of {metadata}") from None
    entries = [_entry(root, line, f"{METADATA} line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not entries:
        raise ValueError(f"{METADATA} must name at least one video, got none in {root}")
    return entries


def checked_clip_shape(value: Any) -> tuple[int, int, int]:
    """The three numbers of a training file's `clip_shape`. Raises ValueError on anything else."""
    fits = isinstance(value, list | tuple) and len(value) == 3 and all(type(n) is int and n > 0 for n in value)
    if not fits:
        raise ValueError(f"clip_shape must be three positive integers (frames, height, width), got {value!r}")
    frames, height, width = value
    return frames, height, width


class FolderDataset:
    """The clips of a folder, resized to one shape, decoded when asked for and kept while they fit the cache.

    root: the folder. clip_shape: (frames, height, width) of every clip given out; a resize is logged once.
    cache_bytes: memory for decoded clips. ValueError at once for a bad folder, VideoError later for an unreadable file.
    """

    def __init__(self, root, clip_shape: tuple[int, int, int] = DEFAULT_CLIP_SHAPE, *, cache_bytes: int = 1 << 30):
        self.clip_shape = checked_clip_shape(clip_shape)
        self.root = Path(root)
        self._entries = read_metadata(self.root)
        self._cache: OrderedDict[Path, torch.Tensor] = OrderedDict()
        self._room = cache_bytes // (3 * self.clip_shape[0] * self.clip_shape[1] * self.clip_shape[2])
        self._warned = False

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sample]:
        return (self.item(i) for i in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        return self.item(index)

    def texts(self) -> list[str]:
        """Every prompt and caption, for a vocabulary."""
        return [text for entry in self._entries for text in (entry.prompt, entry.caption)]

    def item(self, index: int) -> Sample:
        """Clip `index` in the order of the metadata file. IndexError outside 0..len-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        entry = self._entries[index]
        return Sample(self._frames(entry.path), entry.prompt, entry.caption, entry.attrs)

    def batch(self, indices: Sequence[int]) -> dict:
        """Clips `indices` as a dict: frames uint8 [B, F, H, W, 3]; prompts, captions, attrs: lists of B."""
        samples = [self.item(int(i)) for i in indices]
        empty = torch.zeros((0, *self.clip_shape, 3), dtype=torch.uint8)
        return {
            "frames": torch.stack([s.frames for s in samples]) if samples else empty,
            "prompts": [s.prompt for s in samples],
            "captions": [s.caption for s in samples],
            "attrs": [s.attrs for s in samples],
        }

    def _frames(self, path: Path) -> torch.Tensor:
        if path in self._cache:
            self._cache.move_to_end(path)
            return self._cache[path]
        frames, notice = resize_video(read_video(path)[0], self.clip_shape)
        if notice and not self._warned:
            _log.warning("%s: %s (told once for the folder)", path.name, notice)
            self._warned = True
        if self._room:
            self._cache[path] = frames
            if len(self._cache) > self._room:
                self._cache.popitem(last=False)
        return frames

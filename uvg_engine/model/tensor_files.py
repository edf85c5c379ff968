"""Weight files: what they hold, read one tensor at a time, written whole or not at all. No pickle is ever executed."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PathLike = str | os.PathLike[str]
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)


class CheckpointError(ValueError):
    """Weights that cannot be loaded; the message names the file or the keys, and the rule."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint that is read when asked for."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Entries = dict[str, Entry]


def open_weights(source: PathLike | Mapping[str, Any], nested: str | None = None) -> Entries:
    """The tensors of a state dict, a file (.safetensors, or .pth/.pt/.bin/.ckpt), a shard index (.json) or a folder.

    nested: where a mapping holds its state dict under this key, that one is taken. Raises CheckpointError on a file that
    is missing, truncated, of another format, or that holds anything but tensors.
    """
    if isinstance(source, Mapping):
        return _from_mapping(source, "state dict", nested)
    path = Path(source)
    if path.is_dir():
        path = find_weights(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint must be a file or a folder, got {path}, which does not exist")
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    if path.suffix == ".json":
        return _from_index(path, nested)
    if path.suffix in PICKLE_SUFFIXES:
        return _from_mapping(_unpickle(path), str(path), nested)
    raise CheckpointError(f"checkpoint must end in {', '.join(SUFFIXES)} or .json, got {path}")


def find_weights(folder: Path) -> Path:
    """The shard index or the single weight file of a folder, or of its `transformer` (a diffusers pipeline)."""
    for place in (folder, folder / "transformer"):
        for pattern in ("*.index.json", "*.safetensors", *(f"*{suffix}" for suffix in PICKLE_SUFFIXES)):
            found = sorted(path for path in place.glob(pattern) if path.is_file() and not path.name.startswith("."))
            usual = [path for path in found if path.name.startswith(("diffusion_pytorch_model.", "model."))]
            if len(usual or found) == 1:
                return (usual or found)[0]
            if found:
                raise CheckpointError(f"{place} must hold one {pattern}, got {', '.join(path.name for path in found)}")
    raise CheckpointError(f"{folder} must hold weights ({', '.join(SUFFIXES)}), got none")


def _from_mapping(state: Any, name: str, nested: str | None) -> Entries:
    if nested is not None and isinstance(state, Mapping) and isinstance(state.get(nested), Mapping):
        state = state[nested]
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{name} must be a mapping of names to tensors, got {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{name} must map names to tensors, got {key!r}: {type(value).__name__}")
    return {key: Entry(tuple(value.shape), lambda value=value: value) for key, value in state.items()}


def _from_safetensors(path: Path) -> Entries:
    try:
        file = safe_open(path, "pt")
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} must be a whole safetensors file, got {error}") from error
    return {key: Entry(shape, lambda key=key: file.get_tensor(key)) for key, shape in shapes.items()}


def _unpickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch and its zip reader raise many kinds for a broken or hostile file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CheckpointError(
            f"{path} must be a whole torch file of plain tensors, got {type(error).__name__}: {reason}"
        ) from error


def _from_index(path: Path, nested: str | None) -> Entries:
    try:
        places = json.loads(path.read_text())["weight_map"]
        shards = {name: set() for name in places.values()}
        for key, name in places.items():
            shards[name].add(key)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} must be a shard index with a weight_map, got {what}") from error
    entries: Entries = {}
    for name, keys in shards.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path} must name shards of its own folder, got {name!r}")
        shard = open_weights(path.parent / name, nested)
        if set(shard) != keys:
            raise CheckpointError(f"{name} must hold what its index says, {difference(keys, shard)}")
        entries.update(shard)
    return entries


def difference(wanted: Any, got: Any) -> str:
    """'missing N (a, b, ...), unexpected M (...)' of two sets of names."""
    parts = []
    for label, names in (("missing", sorted(set(wanted) - set(got))), ("unexpected", sorted(set(got) - set(wanted)))):
        if names:
            parts.append(f"{label} {len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})")
    return ", ".join(parts) or "no difference"


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends, or is removed when it fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_weights(state: Mapping[str, Tensor], path: PathLike, nested: str | None = None) -> None:
    """Write tensors to .safetensors, or to a torch file (under the key `nested`), by way of a temporary name.

    Raises CheckpointError on another suffix.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"checkpoint must end in {', '.join(SUFFIXES)}, got {path}")
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(tensors, temporary, metadata={"format": "pt"})
        else:
            torch.save({nested: tensors} if nested else tensors, temporary)

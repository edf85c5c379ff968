"""Weight files: what they hold, read one tensor at a time, written whole or not at all. No pickle is ever executed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from uvg_engine.files import replacing

PathLike = str | os.PathLike[str]
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
INDEX_SUFFIX = ".safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class CheckpointError(ValueError):
    """Weights that cannot be loaded; the message names the file or the keys, and the rule."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint that is read when asked for. dtype: torch's name, or the file's where torch has none."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


class Entries(dict[str, Entry]):
    """The tensors of a checkpoint by name. origin: where they come from, for messages."""

    def __init__(self, origin: str, entries: Mapping[str, Entry] | None = None) -> None:
        super().__init__(entries or {})
        self.origin = origin


def open_weights(source: PathLike | Mapping[str, Any], nested: str | None = None) -> Entries:
    """The tensors of a state dict, a file (.safetensors, or .pth/.pt/.bin/.ckpt), a shard index (.json) or a folder.

    nested: where a mapping holds its state dict under this key, that one is taken. Raises CheckpointError on a file
    that is missing, truncated, of another format, or that holds anything but tensors.
    """
    if isinstance(source, Mapping):
        return _from_mapping(source, "state dict", nested)
    path = to_path(source, "checkpoint must be a state dict or")
    if path.is_dir():
        path = find_weights(path)
    if path.suffix == ".json" and path.is_file():
        return _from_index(path, nested)
    return _from_file(path, nested)


def to_path(source: Any, rule: str) -> Path:
    """CheckpointError("<rule> a path, ...") on what is none."""
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"{rule} a path, got {type(source).__name__}")
    return Path(source)


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


def _from_file(path: Path, nested: str | None) -> Entries:
    if not path.is_file():
        raise CheckpointError(f"checkpoint must be a file or a folder that is there, got {path}")
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _from_mapping(_unpickle(path), str(path), nested)
    raise CheckpointError(f"checkpoint must end in {', '.join(SUFFIXES)} or .json, got {path}")


def _from_mapping(state: Any, origin: str, nested: str | None) -> Entries:
    if nested is not None and isinstance(state, Mapping) and isinstance(state.get(nested), Mapping):
        state = state[nested]
    if not isinstance(state, Mapping) or not state:
        got = "an empty one" if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(f"{origin} must be a mapping of names to tensors, got {got}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{origin} must map names to tensors, got {key!r}: {type(value).__name__}")
        if value.is_meta or value.layout != torch.strided:
            got = "a meta tensor" if value.is_meta else str(value.layout)
            raise CheckpointError(f"{origin} must hold dense tensors with memory, got {got} as {key}")
    entries = Entries(origin)
    for key, value in state.items():
        dtype = str(value.dtype).removeprefix("torch.")
        entries[key] = Entry(tuple(value.shape), dtype, partial(state.__getitem__, key))
    return entries


def _from_safetensors(path: Path) -> Entries:
    try:
        file = safe_open(path, "pt")
        slices = {key: file.get_slice(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} must be a whole safetensors file, got {error}") from error
    entries = Entries(str(path))
    for key, view in slices.items():
        dtype = _SAFETENSORS_DTYPES.get(view.get_dtype(), view.get_dtype())
        entries[key] = Entry(tuple(view.get_shape()), dtype, partial(file.get_tensor, key))
    return entries


def _unpickle(path: Path) -> Any:
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_stored(path)
        else:
            _check_pickled(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # torch and its zip reader raise many kinds for a broken or hostile file
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # torch's first line advises to load without the protection; what was refused stands further down
        lines = [line for line in lines if "nsupported" in line] or lines or [""]
        reason = f"{type(error).__name__}: {lines[0].split('. ')[0]}"
        raise CheckpointError(f"{path} must be a whole torch file of plain tensors, got {reason}") from error


def _check_pickled(path: Path) -> None:
    """What torch.save wrote before it wrote zips begins with a protocol; of anything else torch's reader makes sense
    until it fails somewhere."""
    with path.open("rb") as file:
        start = file.read(16)
    if start[:1] != b"\x80":
        raise CheckpointError(f"{path} must be a whole torch file of plain tensors, got one that begins with {start!r}")


def _check_stored(path: Path) -> None:
    """torch.save does not compress: an entry that is, or more bytes than the file has, would fill memory unbidden."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        got = f"{packed[0]} compressed" if packed else "entries of more bytes than the file has"
        raise CheckpointError(f"{path} must hold its tensors uncompressed as torch.save writes them, got {got}")


def _from_index(path: Path, nested: str | None) -> Entries:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, set[str]] = {name: set() for name in places.values()}
        for key, name in places.items():
            shards[name].add(key)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} must be a shard index with a weight_map, got {what}") from error
    entries = Entries(str(path))
    for name, keys in shards.items():
        # a name, not a path: the shard itself may be a link, as in the cache of huggingface_hub
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in SUFFIXES:
            raise CheckpointError(f"{path} must name weight files of its own folder, got {name!r}")
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path} must name shards that are there, got no {name}")
        shard = _from_file(path.parent / name, nested)
        if set(shard) != keys:
            raise CheckpointError(f"{path.parent / name} must hold what its index says, {difference(keys, shard)}")
        entries.update(shard)
    if not entries:
        raise CheckpointError(f"{path} must be a shard index with a weight_map, got an empty one")
    return entries


def difference(wanted: Any, got: Any) -> str:
    """'missing N (a, b, ...), unexpected M (...)' of two sets of names."""
    parts = []
    for label, names in (("missing", sorted(set(wanted) - set(got))), ("unexpected", sorted(set(got) - set(wanted)))):
        if names:
            parts.append(f"{label} {len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})")
    return ", ".join(parts) or "no difference"


def write_weights(state: Mapping[str, Tensor], path: PathLike, nested: str | None = None) -> None:
    """Write tensors to .safetensors, or to a torch file (under the key `nested`), by way of a temporary name.

    Raises CheckpointError on another suffix, and on tensors without memory.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"checkpoint must end in {', '.join(SUFFIXES)}, got {path}")
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            _save_safetensors(state, temporary)
        else:
            tensors = _without_strangers(_on_cpu(state))
            torch.save({nested: tensors} if nested else tensors, temporary)


def write_folder(
    state: Mapping[str, Tensor], folder: PathLike, stem: str, config: Mapping[str, Any], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write config.json and STEM.safetensors, or shards of at most shard_bytes and their index, over what was there.

    Everything is on the disk under temporary names before the first file takes its place. A tensor above shard_bytes
    has a shard of its own. Raises ValueError on shard_bytes below 1, CheckpointError on tensors without memory.
    """
    folder = Path(folder)
    shards = _split(state, shard_bytes)
    many = [f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    names = many if len(shards) > 1 else [f"{stem}.safetensors"]
    texts = {"config.json": config}
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        size = sum(value.nbytes for value in state.values())
        texts[stem + INDEX_SUFFIX] = {"metadata": {"total_size": size}, "weight_map": places}
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:  # takes places in reverse: the shards before what speaks of them
        for name, text in texts.items():
            temporary = stack.enter_context(replacing(folder / name))
            temporary.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        for name, shard in zip(names, shards, strict=True):
            _save_safetensors(shard, stack.enter_context(replacing(folder / name)))
    form = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    for old in folder.iterdir():  # an earlier save may have had other shards
        if form.fullmatch(old.name) and old.name not in {*names, *texts}:
            old.unlink()


def _split(state: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in state.items():
        if shards[-1] and size + value.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += value.nbytes
    return shards


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for key, value in state.items():
        if value.is_meta:
            raise CheckpointError(f"weights must have memory to be saved, got {key} on the meta device")
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def _save_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    save_file(_on_cpu(state), path, metadata={"format": "pt"})


def _without_strangers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """torch.save writes whole storages: a tensor that shares one with tensors that are not saved gets its own."""
    used: Counter[int] = Counter()
    for value in tensors.values():
        used[value.untyped_storage().data_ptr()] += value.nbytes
    return {
        key: value.clone() if used[(storage := value.untyped_storage()).data_ptr()] < storage.nbytes() else value
        for key, value in tensors.items()
    }

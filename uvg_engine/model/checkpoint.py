"""The published checkpoint, and our own folder of config.json + model.safetensors under the same keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from uvg_engine.model.config import UniViGUConfig
from uvg_engine.model.tensor_files import (
    INDEX_SUFFIX,
    SHARD_BYTES,
    CheckpointError,
    Entries,
    PathLike,
    difference,
    open_weights,
    to_path,
    write_folder,
    write_weights,
)
from uvg_engine.model.univigu import UniViGU

CONFIG_FILE, STEM = "config.json", "model"
_WEIGHT_FILES = (f"{STEM}.safetensors", STEM + INDEX_SUFFIX)
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.")
_NESTED = "model"  # the published .pth holds its state dict under this key
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_INV_FREQ = "rotary_emb_text.inv_freq"


def load_published(model: UniViGU, source: PathLike | Mapping[str, Any]) -> UniViGU:
    """Load the published checkpoint into `model`, in place, and return it.

    source: a state dict (or one under "model"), a .pth, .safetensors, shard index or folder. Wrapper prefixes of FSDP
    and torch.compile are dropped. Values are cast to the model's dtype. A model on the meta device is given memory on
    the CPU. Every key and shape must fit: CheckpointError (a ValueError) otherwise, with the model untouched.
    """
    copy_into(model, _published(source))
    return model


def save_published(model: UniViGU, path: PathLike) -> None:
    """Write the published keys to .safetensors, or to .pth under "model"; whole or not at all."""
    write_weights(model.state_dict(), path, _NESTED)


def published_config(source: PathLike | Mapping[str, Any], **changes: Any) -> UniViGUConfig:
    """The config of a published checkpoint, from the shapes of its tensors.

    The quirks are as published (round_temb and round_time on) unless `changes`, which names fields, says otherwise.
    Raises CheckpointError where a tensor that tells a size is missing.
    """
    entries = _published(source)
    return sizes_from(entries, **{"round_temb": True, "round_time": True, **changes})


def save_pretrained(model: UniViGU, folder: PathLike, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json and model.safetensors (published keys), or shards of at most shard_bytes and their index.

    All of it is on the disk under temporary names before the first file takes its place.
    """
    write_folder(model.state_dict(), folder, STEM, model.config.to_dict(), shard_bytes)


def load_pretrained(model: UniViGU, folder: PathLike) -> UniViGU:
    """Load a folder that `save_pretrained` wrote into `model`, in place, and return it.

    Raises CheckpointError where the folder lacks a file, its config is not the model's, or its weights do not fit.
    """
    config, entries = _open_folder(folder)
    ours, theirs = model.config.to_dict(), config.to_dict()
    other = [f"{name} {theirs[name]} for {ours[name]}" for name in ours if ours[name] != theirs[name]]
    if other:
        raise CheckpointError(f"{Path(folder) / CONFIG_FILE} must be the model's config, got {', '.join(other)}")
    copy_into(model, entries)
    return model


def from_pretrained(
    folder: PathLike,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> UniViGU:
    """Build the model of a folder that `save_pretrained` wrote, and load it one tensor at a time.

    dtype: of the weights (None: as stored). compute_dtype: of the matrix products (None: that of the weights). Raises
    CheckpointError on a folder that lacks a file, and on weights that do not fit the config.
    """
    config, entries = _open_folder(folder)
    with torch.device("meta"):
        model = UniViGU(config, compute_dtype)
    check_fit(model, entries)
    stored = (getattr(torch, entry.dtype) for key, entry in entries.items() if key != _INV_FREQ)
    model.to(dtype or reduce(torch.promote_types, stored))
    copy_into(model.to_empty(device=device), entries)
    return model


def _open_folder(folder: PathLike) -> tuple[UniViGUConfig, Entries]:
    folder = to_path(folder, "folder must be")
    found = [name for name in _WEIGHT_FILES if (folder / name).is_file()]
    if not (folder / CONFIG_FILE).is_file() or len(found) != 1:
        names = [CONFIG_FILE] * (folder / CONFIG_FILE).is_file() + found
        wanted = f"{CONFIG_FILE} and one of {', '.join(_WEIGHT_FILES)}"
        raise CheckpointError(f"{folder} must hold {wanted}, got {' and '.join(names) or 'neither'}")
    return UniViGUConfig.from_json(folder / CONFIG_FILE), open_weights(folder / found[0])


def _published(source: PathLike | Mapping[str, Any]) -> Entries:
    stored = open_weights(source, _NESTED)
    entries = Entries(stored.origin)
    for key, entry in stored.items():
        plain = key
        for wrapper in _WRAPPERS:
            plain = plain.replace(wrapper, "")
        if plain in entries:
            raise CheckpointError(f"{stored.origin} must name {plain} once, got it with and without a wrapper prefix")
        entries[plain] = entry
    return entries


def sizes_from(entries: Entries, **changes: Any) -> UniViGUConfig:
    """A config from the shapes of tensors under the published names; `changes` are fields that win over the shapes."""

    def shape(key: str, dims: int) -> tuple[int, ...]:
        if key not in entries or len(entries[key].shape) != dims:
            got = entries[key].shape if key in entries else "no such tensor"
            raise CheckpointError(f"{entries.origin} must hold {key} with {dims} dimensions, got {got}")
        return entries[key].shape

    dim, channels, *patch = shape("patch_embedding.weight", 5)
    head_dim = changes.pop("head_dim", None) or 2 * shape(_INV_FREQ, 1)[0]
    if head_dim < 1 or dim % head_dim:
        raise CheckpointError(f"head_dim must divide the width {dim} of {entries.origin}, got {head_dim}")
    numbers = {int(found[1]) for key in entries if (found := re.match(r"blocks\.(\d{1,6})\.", key))}
    if numbers != set(range(len(numbers))):
        got = f"{len(numbers)} of them up to {max(numbers)}"
        raise CheckpointError(f"{entries.origin} must number its blocks 0, 1, ... without a gap, got {got}")
    sizes = {
        "heads": dim // head_dim,
        "head_dim": head_dim,
        "in_channels": channels,
        "patch": tuple(patch),
        "text_dim": shape("cond_text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shape("time_embedding_v.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "layers": len(numbers),
    }
    if "vocab" not in changes:
        sizes["vocab"] = shape("vocab_embed.weight", 2)[0]
    return UniViGUConfig.from_dict({**sizes, **changes})


def check_fit(model: UniViGU, entries: Entries, keys: set[str] | None = None) -> None:
    """Raise CheckpointError unless names (all of the model's, or `keys`), shapes and dtypes (floating) fit."""
    targets = model.state_dict()
    wanted = set(targets) if keys is None else keys
    if set(entries) != wanted:
        raise CheckpointError(f"{entries.origin} must have the model's keys, got {difference(wanted, entries)}")
    pairs = [(key, entries[key], tuple(targets[key].shape)) for key in sorted(wanted)]
    shapes = [f"{key} {entry.shape} for {shape}" for key, entry, shape in pairs if entry.shape != shape]
    dtypes = [f"{key} {entry.dtype}" for key, entry, _ in pairs if entry.dtype not in _DTYPES]
    for rule, wrong in (("the model's shapes", shapes), (f"one of the dtypes {', '.join(_DTYPES)}", dtypes)):
        if wrong:
            more = f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else ""
            raise CheckpointError(f"{entries.origin} must have {rule}, got {'; '.join(wrong[:4])}{more}")


@torch.no_grad()
def copy_into(model: UniViGU, entries: Entries, keys: set[str] | None = None) -> None:
    """Copy tensors into the model one at a time, after `check_fit`; a model without memory gets it first, on the CPU.

    The state dict's tensors share the model's memory, experts included, so nothing is stacked or held twice.
    """
    check_fit(model, entries, keys)
    if model.device.type == "meta":
        model.to_empty(device="cpu")
        model.rotary_emb_text.reset_parameters()
    for key, target in model.state_dict().items():
        if key in entries:
            target.copy_(entries[key].read())
    model.rotary_emb_text.forget_table()

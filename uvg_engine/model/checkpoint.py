"""The published checkpoint, and our own folder of config.json + model.safetensors under the same keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from uvg_engine.model.config import UniViGUConfig
from uvg_engine.model.tensor_files import (
    CheckpointError,
    Entries,
    PathLike,
    difference,
    open_weights,
    replacing,
    write_weights,
)
from uvg_engine.model.univigu import UniViGU

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.")
_NESTED = "model"  # the published .pth holds its state dict under this key


def load_published(model: UniViGU, source: PathLike | Mapping[str, Any]) -> UniViGU:
    """Load the published checkpoint into `model`, in place, and return it.

    source: a state dict (or one under "model"), a .pth, .safetensors, shard index or folder. Wrapper prefixes of FSDP
    and torch.compile are dropped. A model on the meta device is given memory on the CPU. Every key and shape must fit:
    CheckpointError (a ValueError) otherwise, with the model untouched.
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


def save_pretrained(model: UniViGU, folder: PathLike) -> None:
    """Write config.json and model.safetensors (published keys); each by way of a temporary name."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(model.state_dict(), folder / WEIGHTS_FILE)
    with replacing(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")


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
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} must hold {CONFIG_FILE} and {WEIGHTS_FILE}, got no {name}")
    config = UniViGUConfig.from_json(folder / CONFIG_FILE)
    entries = open_weights(folder / WEIGHTS_FILE)
    with torch.device("meta"):
        model = UniViGU(config, compute_dtype)
    check_fit(model, entries)
    model.to(dtype or entries["patch_embedding.weight"].read().dtype)
    copy_into(model.to_empty(device=device), entries)
    return model


def _published(source: PathLike | Mapping[str, Any]) -> Entries:
    entries: Entries = {}
    for key, entry in open_weights(source, _NESTED).items():
        plain = key
        for wrapper in _WRAPPERS:
            plain = plain.replace(wrapper, "")
        if plain in entries:
            raise CheckpointError(f"checkpoint must name {plain} once, got it with and without a wrapper prefix")
        entries[plain] = entry
    return entries


def sizes_from(entries: Entries, **changes: Any) -> UniViGUConfig:
    """A config from the shapes of tensors under the published names; `changes` are fields that win over the shapes."""

    def shape(key: str, dims: int) -> tuple[int, ...]:
        if key not in entries or len(entries[key].shape) != dims:
            got = entries[key].shape if key in entries else "no such tensor"
            raise CheckpointError(f"{key} must be there with {dims} dimensions, got {got}")
        return entries[key].shape

    dim, channels, *patch = shape("patch_embedding.weight", 5)
    head_dim = changes.pop("head_dim", None) or 2 * shape("rotary_emb_text.inv_freq", 1)[0]
    if dim % head_dim:
        raise CheckpointError(f"head_dim must divide the width {dim}, got {head_dim}")
    sizes = {
        "heads": dim // head_dim,
        "head_dim": head_dim,
        "in_channels": channels,
        "patch": tuple(patch),
        "text_dim": shape("cond_text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shape("time_embedding_v.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "layers": 1 + max(int(key.split(".")[1]) for key in entries if key.startswith("blocks.")),
    }
    if "vocab" not in changes:
        sizes["vocab"] = shape("vocab_embed.weight", 2)[0]
    return UniViGUConfig.from_dict({**sizes, **changes})


def check_fit(model: UniViGU, entries: Entries, keys: set[str] | None = None) -> None:
    """Raise CheckpointError unless the names (all of the model's, or `keys`) and the shapes agree."""
    targets = model.state_dict()
    wanted = set(targets) if keys is None else keys
    if set(entries) != wanted:
        raise CheckpointError(f"checkpoint must have the model's keys, got {difference(wanted, entries)}")
    wrong = [key for key in sorted(wanted) if entries[key].shape != tuple(targets[key].shape)]
    if wrong:
        shown = "; ".join(f"{key} {tuple(targets[key].shape)}, got {entries[key].shape}" for key in wrong[:4])
        more = f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else ""
        raise CheckpointError(f"checkpoint must have the model's shapes: {shown}{more}")


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

"""Wan2.1 text-to-video weights, in diffusers' names and the original ones: in (and text parts made of them) and out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uvg_engine.model.checkpoint import copy_into, sizes_from
from uvg_engine.model.config import UniViGUConfig
from uvg_engine.model.tensor_files import (
    SHARD_BYTES,
    SUFFIXES,
    CheckpointError,
    Entries,
    PathLike,
    difference,
    find_weights,
    open_weights,
    write_folder,
    write_weights,
)
from uvg_engine.model.text_init import text_from_video
from uvg_engine.model.univigu import UniViGU

# ours -> theirs, by the start of the name; the same start means the same name
_DIFFUSERS = {
    "patch_embedding.": "patch_embedding.",
    "cond_text_embedder.linear_1.": "condition_embedder.text_embedder.linear_1.",
    "cond_text_embedder.linear_2.": "condition_embedder.text_embedder.linear_2.",
    "time_embedding_v.time_embedder.linear_1.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding_v.time_embedder.linear_2.": "condition_embedder.time_embedder.linear_2.",
    "time_embedding_v.time_proj.": "condition_embedder.time_proj.",
    "scale_shift_table_v": "scale_shift_table",
    "video_head.proj_out.": "proj_out.",
}
_ORIGINAL = {
    "patch_embedding.": "patch_embedding.",
    "cond_text_embedder.linear_1.": "text_embedding.0.",
    "cond_text_embedder.linear_2.": "text_embedding.2.",
    "time_embedding_v.time_embedder.linear_1.": "time_embedding.0.",
    "time_embedding_v.time_embedder.linear_2.": "time_embedding.2.",
    "time_embedding_v.time_proj.": "time_projection.1.",
    "scale_shift_table_v": "head.modulation",
    "video_head.proj_out.": "head.head.",
}
_ATTENTION = {"to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "o."}
_ATTENTION |= {"norm_q.": "norm_q.", "norm_k.": "norm_k."}
_ORIGINAL_BLOCK = {
    "scale_shift_table": "modulation",
    "norm2.": "norm3.",  # the affine norm before cross-attention
    "ffn.net.0.proj.": "ffn.0.",
    "ffn.net.2.": "ffn.2.",
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
}
_DIFFUSERS_BLOCK = {ours: ours for ours in _ORIGINAL_BLOCK}
NAMINGS = {"diffusers": (_DIFFUSERS, _DIFFUSERS_BLOCK), "original": (_ORIGINAL, _ORIGINAL_BLOCK)}
_MARKS = {"diffusers": ("condition_embedder.",), "original": ("text_embedding.", "time_embedding.", "head.")}
_PREFIX = "model.diffusion_model."  # some single-file exports
_STEM = "diffusion_pytorch_model"  # of the files in a folder, in both namings
_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def load_wan(model: UniViGU, source: PathLike | Mapping[str, Any]) -> UniViGU:
    """Load Wan2.1 T2V weights into `model`, in place, make the text parts from them, and return it.

    source: a state dict, a .safetensors or .pth, a shard index, or a folder (of a pipeline too); diffusers' or the
    original names. With text absent the model then gives Wan's velocity. The text embedding is drawn from torch's
    global generator. Every key and shape must fit, and the heads where a folder's config.json tells them:
    CheckpointError (a ValueError) otherwise, with the model untouched.
    """
    told = _told_head_dim(source)
    if told not in (None, model.config.head_dim):
        raise CheckpointError(f"head_dim must be {told} by the config.json of {source}, got {model.config.head_dim}")
    stored, naming = _recognised(source)
    keys = {theirs: ours for ours in model.state_dict() if (theirs := _rename(ours, *NAMINGS[naming]))}
    if set(stored) != set(keys):
        raise CheckpointError(f"{stored.origin} must have the keys of Wan2.1 T2V, got {difference(keys, stored)}")
    entries = Entries(stored.origin, {keys[theirs]: entry for theirs, entry in stored.items()})
    copy_into(model, entries, set(entries))
    return text_from_video(model)


def wan_config(
    source: PathLike | Mapping[str, Any], *, vocab: int, head_dim: int | None = None, **changes: Any
) -> UniViGUConfig:
    """The config of a model that can hold these Wan2.1 weights, from their shapes.

    vocab: V of the text stream to be added. head_dim: the shapes do not tell it; None is what a folder's config.json
    says, and without one 128, as in every Wan2.1. changes: other fields. Raises CheckpointError where a tensor that
    tells a size is missing.
    """
    if head_dim is None:
        head_dim = _told_head_dim(source) or 128
    stored, naming = _recognised(source)
    top, block = ({theirs: ours for ours, theirs in table.items()} for table in NAMINGS[naming])
    known = {ours: entry for key, entry in stored.items() if (ours := _rename(key, top, block))}
    return sizes_from(Entries(stored.origin, known), vocab=vocab, head_dim=head_dim, **changes)


def save_wan(model: UniViGU, path: PathLike, naming: str = "diffusers", *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the video part under Wan2.1's names: the text parts stay behind.

    path: a .safetensors or .pth (one file), else a folder, which gets config.json and weights as diffusers'
    WanTransformer3DModel or the original WanModel read them, in shards of at most shard_bytes. naming: "diffusers" or
    "original". Raises ValueError on another naming.
    """
    if naming not in NAMINGS:
        raise ValueError(f"naming must be one of {', '.join(NAMINGS)}, got {naming!r}")
    rules = NAMINGS[naming]
    state = {theirs: value for ours, value in model.state_dict().items() if (theirs := _rename(ours, *rules))}
    if Path(path).suffix in SUFFIXES:
        write_weights(state, path)
    else:
        write_folder(state, path, _STEM, _folder_config(model.config, naming), shard_bytes)


def _folder_config(config: UniViGUConfig, naming: str) -> dict[str, Any]:
    """config.json with the arguments of the class that reads it, where Wan2.1 T2V sets them."""
    shared = {"patch_size": list(config.patch), "text_dim": config.text_dim, "freq_dim": config.freq_dim}
    shared |= {"ffn_dim": config.ffn_dim, "num_layers": config.layers, "cross_attn_norm": True, "eps": 1e-6}
    channels = config.in_channels
    if naming == "diffusers":
        heads = {"num_attention_heads": config.heads, "attention_head_dim": config.head_dim}
        own = {"in_channels": channels, "out_channels": channels, "qk_norm": "rms_norm_across_heads", **heads}
        return {"_class_name": "WanTransformer3DModel", **shared, **own}
    own = {"in_dim": channels, "out_dim": channels, "dim": config.dim, "num_heads": config.heads, "qk_norm": True}
    return {"_class_name": "WanModel", "model_type": "t2v", "text_len": 512, **shared, **own}


def _told_head_dim(source: PathLike | Mapping[str, Any]) -> int | None:
    """The width of a head by the config.json beside a folder's weights; None where nothing tells it."""
    if not isinstance(source, (str, os.PathLike)) or not Path(source).is_dir():
        return None
    path = find_weights(Path(source)).parent / "config.json"
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if "attention_head_dim" in told:
            return int(told["attention_head_dim"])
        return int(told["dim"]) // int(told["num_heads"]) if {"dim", "num_heads"} <= set(told) else None
    except (OSError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{path} must be the json of a Wan2.1 transformer, got {error}") from error


def _recognised(source: PathLike | Mapping[str, Any]) -> tuple[Entries, str]:
    """The tensors under Wan's own names, and which naming that is."""
    stored = open_weights(source)
    entries = Entries(stored.origin)
    for key, entry in stored.items():
        plain = key.removeprefix(_PREFIX)
        if plain in entries:
            raise CheckpointError(f"{stored.origin} must name {plain} once, got it with and without {_PREFIX}")
        entries[plain] = entry
    for naming, marks in _MARKS.items():
        if any(key.startswith(marks) for key in entries):
            return entries, naming
    got = f"{', '.join(sorted(entries)[:4])}{', ...' if len(entries) > 4 else ''}"
    raise CheckpointError(f"{stored.origin} must be Wan2.1 T2V in diffusers' or the original names, got {got}")


def _rename(key: str, top: Mapping[str, str], block: Mapping[str, str]) -> str | None:
    """The name under the rules for the top and for a block; None where none serves (a text part, a stranger)."""
    found = _BLOCK.fullmatch(key)
    head, key, rules = (found[1], found[2], block) if found else ("", key, top)
    for start, to in rules.items():
        if key == start or (start.endswith(".") and key.startswith(start)):
            return head + to + key[len(start) :]
    return None

"""Wan2.1 text-to-video weights, in diffusers' names and in the original ones: in (the text parts made from them) and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uvg_engine.model.checkpoint import check_fit, copy_into, sizes_from
from uvg_engine.model.config import UniViGUConfig
from uvg_engine.model.tensor_files import CheckpointError, Entries, PathLike, open_weights, write_weights
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
_PREFIX = "model.diffusion_model."  # some single-file exports


def load_wan(model: UniViGU, source: PathLike | Mapping[str, Any]) -> UniViGU:
    """Load Wan2.1 T2V weights into `model`, in place, make the text parts from them, and return it.

    source: a state dict, a .safetensors or .pth, a shard index, or a folder (of a pipeline too); diffusers' or the
    original names. With text absent the model then gives Wan's velocity. The text embedding is drawn from torch's global
    generator. Every key and shape must fit: CheckpointError (a ValueError) otherwise, with the model untouched.
    """
    entries = _ours(open_weights(source))
    keys = {key for key in model.state_dict() if _theirs(key, "diffusers")}
    check_fit(model, entries, keys)
    copy_into(model, entries, keys)
    return text_from_video(model)


def wan_config(
    source: PathLike | Mapping[str, Any], *, vocab: int, head_dim: int = 128, **changes: Any
) -> UniViGUConfig:
    """The config of a model that can hold these Wan2.1 weights; vocab: V of the text stream to be added."""
    return sizes_from(_ours(open_weights(source)), vocab=vocab, head_dim=head_dim, **changes)


def save_wan(model: UniViGU, path: PathLike, naming: str = "diffusers") -> None:
    """Write the video part under Wan2.1's names ("diffusers" or "original") to .safetensors or .pth; whole or not."""
    if naming not in NAMINGS:
        raise ValueError(f"naming must be one of {', '.join(NAMINGS)}, got {naming!r}")
    named = {_theirs(key, naming): value for key, value in model.state_dict().items()}
    write_weights({key: value for key, value in named.items() if key}, path)


def _ours(entries: Entries) -> Entries:
    """The entries under our names; those that no rule knows keep theirs, for `check_fit` to tell."""
    entries = {key.removeprefix(_PREFIX): entry for key, entry in entries.items()}
    naming = "original" if any(key.startswith(("head.", "text_embedding.")) for key in entries) else "diffusers"
    if not any(key.startswith("blocks.") for key in entries):
        raise CheckpointError("checkpoint must be Wan2.1 T2V in diffusers' or the original names, got no blocks")
    top, block = ({theirs: ours for ours, theirs in table.items()} for table in NAMINGS[naming])
    return {_rename(key, top, block) or key: entry for key, entry in entries.items()}


def _theirs(key: str, naming: str) -> str | None:
    """Wan's name of one of our keys; None for a text part."""
    return _rename(key, *NAMINGS[naming])


def _rename(key: str, top: Mapping[str, str], block: Mapping[str, str]) -> str | None:
    head, rules = "", top
    if key.startswith("blocks."):
        _, index, key = key.split(".", 2)
        head, rules = f"blocks.{index}.", block
    for start, to in rules.items():
        if key == start or (start.endswith(".") and key.startswith(start)):
            return head + to + key[len(start) :]
    return None

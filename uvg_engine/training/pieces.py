"""Data set, codec, tokenizer and text encoder of a training file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from uvg_engine.media.codec import PixelCodec, codec_from_config
from uvg_engine.media.text_encoder import text_encoder_from_config
from uvg_engine.media.tokenizer import WordTokenizer, tokenizer_from_config
from uvg_engine.model.config import UniViGUConfig, named_config
from uvg_engine.model.patches import patch_grid
from uvg_engine.training.batch import Pieces
from uvg_engine.training.config import TrainConfig
from uvg_engine.training.data.digits import DigitsDataset
from uvg_engine.training.data.digits_text import vocabulary
from uvg_engine.training.data.folder import FolderDataset

FIT_SAMPLES = 512
FIT_BYTES = 1 << 26  # of pixels at a time; the codec needs some 12 times as much for them


def make_dataset(config: TrainConfig) -> Any:
    """The data set of the file's `data` mapping. Raises ValueError on an unknown type or setting."""
    settings = dict(config.data)
    kind = settings.pop("type", None)
    makers = {"digits": DigitsDataset, "folder": FolderDataset}
    if not isinstance(kind, str) or kind not in makers:
        raise ValueError(f"data.type must be one of {', '.join(makers)}, got {kind!r}")
    if kind == "digits":
        settings.setdefault("seed", config.seed)
    else:
        settings["root"] = settings.pop("path", None)
    try:
        return makers[kind](**settings)
    except TypeError as error:
        raise ValueError(f"data settings must fit {kind}, got {config.data!r}: {error}") from error


def data_order(position: int, size: int, seed: int) -> int:
    """Index of the sample at a place of the endless order: a fresh permutation each epoch, computed without a table.

    A 4-round Feistel network over the next power of four, walked until it falls below size.
    """
    epoch, place = divmod(position, size)
    bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = place >> bits, place & mask
        for turn in range(4):
            mixed = (right * 0x9E3779B1 + seed * 0x85EBCA77 + epoch * 0xC2B2AE3D + turn * 0x27D4EB2F) & 0xFFFFFFFF
            mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 13)) & mask)
        place = left << bits | right
        if place < size:
            return place


def make_pieces(config: TrainConfig, dataset: Any) -> Pieces:
    """Codec (fitted on the data when its statistics are absent), tokenizer (words of the data) and text encoder.

    Raises ValueError on settings that do not fit one another, the model or the data, before a clip is read.
    """
    codec = codec_from_config(config.codec)
    settings = config.tokenizer
    if settings == {"type": "word"}:
        settings = {"type": "word", "words": _words(dataset)}
    tokenizer = tokenizer_from_config(settings)
    pieces = Pieces(codec, tokenizer, text_encoder_from_config(config.text_encoder))
    model = model_config(config, pieces)
    patch_grid(codec.latent_shape(dataset.clip_shape)[1:], model)  # errors, before clips are read
    if not isinstance(codec, PixelCodec):
        return pieces
    given = {"mean", "std"} & set(config.codec)
    if len(given) == 1:
        raise ValueError(f"codec must have both mean and std, or neither to have them fitted, got {given.pop()} alone")
    if given:
        return pieces
    count = min(FIT_SAMPLES, len(dataset))
    size = max(1, min(64, FIT_BYTES // (3 * math.prod(dataset.clip_shape))))
    parts = (range(start, min(start + size, count)) for start in range(0, count, size))
    return replace(pieces, codec=codec.fit(dataset.batch(part)["frames"] for part in parts))


def saved_pieces(config: TrainConfig, saved: Mapping[str, Any]) -> Pieces:
    """The pieces of a checkpoint, as fitted when the run began: the data set is not asked again."""
    return Pieces(
        codec_from_config(saved["codec"]),
        tokenizer_from_config(saved["tokenizer"]),
        text_encoder_from_config(config.text_encoder),
    )


def model_config(config: TrainConfig, pieces: Pieces) -> UniViGUConfig:
    """The model of the file's `model`, named or spelled out, with the vocabulary and channels of its pieces.

    Raises ValueError where model and pieces, or the text's source and the tokenizer, do not fit each other.
    """
    sizes = {"vocab": pieces.tokenizer.vocab_size, "in_channels": pieces.codec.channels}
    if isinstance(config.model, str):
        model = named_config(config.model, **sizes)
    else:
        model = UniViGUConfig.from_dict({**sizes, **config.model})
    for name, size, owner in (
        ("text_dim", pieces.text_encoder.text_dim, "text encoder"),
        ("in_channels", pieces.codec.channels, "codec"),
    ):
        if getattr(model, name) != size:
            raise ValueError(f"model.{name} must be {size} as the {owner} has it, got {getattr(model, name)}")
    words = pieces.tokenizer.vocab_size
    if model.vocab < words:
        raise ValueError(f"model.vocab must be at least the tokenizer's {words}, got {model.vocab}")
    if config.source == "mask" and pieces.tokenizer.mask_id is None:
        raise ValueError("source must be uniform for a tokenizer without a mask token, got 'mask'")
    return model


def _words(dataset: Any) -> list[str]:
    if isinstance(dataset, DigitsDataset):
        return vocabulary()
    return list(WordTokenizer.from_texts(dataset.texts()).words)

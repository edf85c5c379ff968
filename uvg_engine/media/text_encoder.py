"""Frozen text encoders: what cross-attention reads.

`HashTextEncoder` needs no weights: a word's vector is a function of its letters, the same on every machine.
`UMT5TextEncoder` is the encoder of Wan2.1 and the published Uni-ViGU.
"""

from __future__ import annotations

import hashlib
import html
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from uvg_engine.media._arguments import arguments, flag, of_type, positive
from uvg_engine.media.tokenizer import load_hf_tokenizer, split_words, string_list


def text_encoder_from_config(config: Mapping[str, Any]) -> HashTextEncoder | UMT5TextEncoder:
    """The encoder that `config["type"]` names: "hash" or "umt5". Raises ValueError for any other."""
    kinds: dict[str, type[HashTextEncoder] | type[UMT5TextEncoder]] = {"hash": HashTextEncoder, "umt5": UMT5TextEncoder}
    return of_type("text encoder", kinds, config).from_config(config)


class HashTextEncoder:
    """Word -> fixed near-gaussian vector of norm sqrt(text_dim), plus half a sinusoidal position embedding.

    Splits as WordTokenizer does, so case and spacing do not matter. Words past max_len are not read.
    """

    def __init__(self, text_dim: int = 128, max_len: int = 64) -> None:
        self.text_dim, self.max_len = positive("text_dim", text_dim), positive("max_len", max_len)
        if self.text_dim % 2:
            raise ValueError(f"text_dim must be even, got {text_dim}")
        self._positions = _positions(self.max_len, self.text_dim)
        self._vectors: dict[str, torch.Tensor] = {}

    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """fp32 [num_words, text_dim] per text, no padding; a text without words gives `null()`."""
        return [self._encode_one(text) for text in string_list(texts)]

    def null(self) -> torch.Tensor:
        """The condition that says nothing: zeros [1, text_dim]."""
        return torch.zeros(1, self.text_dim, dtype=torch.float32, device="cpu")

    def to_config(self) -> dict[str, Any]:
        """Plain values for json; `from_config` gives the same encoder back."""
        return {"type": "hash", "text_dim": self.text_dim, "max_len": self.max_len}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HashTextEncoder:
        """Inverse of `to_config`. Raises ValueError for an unknown key."""
        return cls(**arguments("text encoder", "hash", {"text_dim", "max_len"}, config))

    def _encode_one(self, text: str) -> torch.Tensor:
        words = split_words(text)[: self.max_len]
        if not words:
            return self.null()
        return torch.stack([self._vector(word) for word in words]) + self._positions[: len(words)]

    def _vector(self, word: str) -> torch.Tensor:
        if word not in self._vectors:
            vector = torch.from_numpy(_word_vector(word, self.text_dim))
            if len(self._vectors) >= 65536:  # a long-lived service sees any word; forgetting one costs little
                return vector
            self._vectors[word] = vector
        return self._vectors[word]


class UMT5TextEncoder:
    """UMT5's encoder (transformers), as Wan2.1 uses it: always max_len rows, the prompt first.

    path: local folder of the model (tokenizer in it, or in tokenizer_path); or `model` and `tokenizer` objects.
    zero_past_prompt: rows past the prompt are zeros, as in Wan2.1; the published Uni-ViGU leaves them as the encoder
    gives them (False). Prompts are unescaped from HTML and their white space is collapsed.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        tokenizer_path: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        max_len: int = 512,
        zero_past_prompt: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if (path is None) == (model is None) or (model is None) != (tokenizer is None):
            raise ValueError("give either path, or model and tokenizer")
        self.max_len, self.zero_past_prompt = positive("max_len", max_len), flag("zero_past_prompt", zero_past_prompt)
        self.path = None if path is None else str(path)
        self.tokenizer_path = None if tokenizer_path is None else str(tokenizer_path)
        self.model = (_load_umt5(str(path), dtype) if model is None else model).to(device=device, dtype=dtype).eval()
        self.model.requires_grad_(False)
        self.tokenizer = load_hf_tokenizer(self.tokenizer_path or str(path)) if tokenizer is None else tokenizer
        self.text_dim = int(self.model.config.d_model)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """fp32 [max_len, text_dim] per text, on the encoder's device; one text at a time, so no neighbour matters."""
        return [self._encode_one(text) for text in string_list(texts)]

    def null(self) -> torch.Tensor:
        """The condition that says nothing: zeros [1, text_dim] (equal rows attend as one)."""
        return torch.zeros(1, self.text_dim, dtype=torch.float32, device="cpu")

    def to_config(self) -> dict[str, Any]:
        """Plain values for json. Raises ValueError for one made from objects, not a folder."""
        if self.path is None:
            raise ValueError("a UMT5TextEncoder has a config only when made from a path, got one made from objects")
        config = {"type": "umt5", "path": self.path, "max_len": self.max_len, "zero_past_prompt": self.zero_past_prompt}
        return config | ({"tokenizer_path": self.tokenizer_path} if self.tokenizer_path else {})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UMT5TextEncoder:
        """Inverse of `to_config`. Raises ValueError for an unknown key or an unreadable folder."""
        names = {"path", "tokenizer_path", "max_len", "zero_past_prompt"}
        return cls(**arguments("text encoder", "umt5", names, config))

    def _encode_one(self, text: str) -> torch.Tensor:
        text = re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()
        batch = self.tokenizer(
            [text],
            padding="max_length",
            max_length=self.max_len,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        device = next(self.model.parameters()).device
        mask = batch["attention_mask"].to(device)
        rows = self.model(input_ids=batch["input_ids"].to(device), attention_mask=mask).last_hidden_state[0].float()
        if self.zero_past_prompt:
            rows = rows.masked_fill(mask[0, :, None] == 0, 0.0)
        return rows


def _load_umt5(path: str, dtype: torch.dtype) -> Any:
    try:
        from transformers import UMT5EncoderModel
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ValueError("the umt5 text encoder needs the package transformers: pip install transformers") from error
    if not os.path.isdir(path):
        raise ValueError(f"path must be a folder with a transformers UMT5 encoder, got {path!r}")
    try:
        return UMT5EncoderModel.from_pretrained(path, local_files_only=True, use_safetensors=True, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"path must be a folder with a transformers UMT5 encoder, got {path!r}: {reason}") from error


def _word_vector(word: str, text_dim: int) -> np.ndarray:
    """fp32 [text_dim] from the word's bytes: sums of 8 uniform 16-bit integers, scaled to norm sqrt(text_dim).

    Integers, one correctly rounded sqrt, one division: the same bits on every machine, with no generator whose stream
    could change between versions.
    """
    stream = hashlib.shake_256(b"uvg_engine.word/" + word.encode("utf-8")).digest(text_dim * 16)
    draws = np.frombuffer(stream, dtype="<u2").astype(np.int64).reshape(text_dim, 8)
    centred = 2 * draws.sum(1) - 8 * 65535
    norm = math.sqrt(int((centred * centred).sum()))
    return (centred * (math.sqrt(text_dim) / norm)).astype(np.float32)


def _positions(length: int, text_dim: int) -> torch.Tensor:
    """0.5 * [cos, sin] of position * 10000^(-j/half), rounded to 2^-16 so that libm's last bit cannot show."""
    half = text_dim // 2
    angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(half) / half)[None]
    table = 0.5 * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    return torch.from_numpy((np.round(table * 65536) / 65536).astype(np.float32))

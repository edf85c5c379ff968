"""Tokenizers for the text stream: a word-level one that needs no files, and a wrapper for transformers' own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from uvg_engine.files import replacing
from uvg_engine.media._arguments import of_type

_PIECES = re.compile(r"\w+(?:['-]\w+)*|[^\w\s]")
_NO_SPACE_BEFORE = frozenset(",.;:!?")


def split_words(text: str) -> list[str]:
    """Lower-case words and punctuation marks of a text, in order; "left-hand" stays one word, "seven," is two."""
    return _PIECES.findall(text.lower().replace("\u2019", "'"))


def join_words(words: Iterable[str]) -> str:
    """Words to a text: one space between, none before , . ; : ! ?"""
    text = ""
    for word in words:
        text += word if not text or word in _NO_SPACE_BEFORE else " " + word
    return text


def normalise(text: str) -> str:
    """The form in which a text comes back from encode and decode."""
    return join_words(split_words(text))


def string_list(texts: Iterable[str]) -> list[str]:
    """The texts of a list, a generator, an array as of a table's column. ValueError where they are no strings."""
    try:
        each = None if isinstance(texts, (str, Mapping, Set)) else iter(texts)
    except TypeError:  # of no iterable, or of an array without dimensions
        each = None
    listed = None if each is None else list(each)
    if listed is None or not all(isinstance(text, str) for text in listed):
        raise ValueError(f"texts must be a list of strings, got {texts!r:.80}")
    return listed


def _string(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"text must be a string, got {type(text).__name__}")
    return text


def tokenizer_from_config(config: Mapping[str, Any]) -> WordTokenizer | HFTokenizer:
    """The tokenizer that `config["type"]` names: "word" or "hf". Raises ValueError for any other."""
    kinds: dict[str, type[WordTokenizer] | type[HFTokenizer]] = {"word": WordTokenizer, "hf": HFTokenizer}
    return of_type("tokenizer", kinds, config).from_config(config)


class WordTokenizer:
    """One id per word. Ids: 0 pad, 1 eos, 2 unk, 3 mask, then the vocabulary in its order.

    words: the vocabulary; every entry must be one piece of `split_words`, without repeats (ValueError).
    """

    SPECIAL = ("<pad>", "<eos>", "<unk>", "<mask>")
    pad_id, eos_id, unk_id, mask_id = 0, 1, 2, 3

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)
        for word in self.words:
            if not isinstance(word, str) or split_words(word) != [word]:
                raise ValueError(f"a vocabulary entry must be one lower-case word or mark, got {word!r}")
        self._ids = {word: index for index, word in enumerate(self.words, len(self.SPECIAL))}
        if len(self._ids) != len(self.words):
            twice = next(word for word in self.words if self.words.count(word) > 1)
            raise ValueError(f"vocabulary entries must differ, got {twice!r} twice")

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> WordTokenizer:
        """A tokenizer that knows every word of the texts, sorted."""
        return cls(sorted({word for text in string_list(texts) for word in split_words(text)}))

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return len(self.SPECIAL) + len(self.words)

    def encode(self, text: str, length: int | None = None, *, truncate: bool = False) -> list[int]:
        """Ids of a text, eos at the end; with `length`, padded to it.

        A text of more than length - 1 words: ValueError, or cut (eos kept) with truncate=True.
        """
        ids = [self._ids.get(word, self.unk_id) for word in split_words(_string(text))]
        return _finish(ids, self.eos_id, self.pad_id, length, truncate)

    def decode(self, ids: Sequence[int] | torch.Tensor, *, stop_at_eos: bool = True) -> str:
        """Text of ids: pads dropped, unk and mask shown as <unk> and <mask>; ends at the first eos.

        With stop_at_eos=False an eos is dropped and the rest is read too. Raises ValueError for an id out of range.
        """
        words = []
        for index in _id_list(ids, self.vocab_size):
            if index == self.eos_id and stop_at_eos:
                break
            if index not in (self.eos_id, self.pad_id):
                words.append(self.token(index))
        return join_words(words)

    def token(self, index: int) -> str:
        """The word of one id."""
        special = len(self.SPECIAL)
        return self.SPECIAL[index] if index < special else self.words[index - special]

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that the vocabulary lacks, each once, in order: for a caller to warn about."""
        return [word for word in dict.fromkeys(split_words(_string(text))) if word not in self._ids]

    def to_config(self) -> dict[str, Any]:
        """Plain values for json; `from_config` gives the same tokenizer back."""
        return {"type": "word", "words": list(self.words)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> WordTokenizer:
        """Inverse of `to_config`."""
        words = config.get("words") if isinstance(config, Mapping) else None
        if not isinstance(words, list) or config.get("type", "word") != "word":
            raise ValueError('a word tokenizer config must be {"type": "word", "words": [...]}')
        return cls(words)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary as json, under a temporary name first: a reader never sees half a file."""
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            json.dump(self.to_config(), file, ensure_ascii=False, indent=1)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WordTokenizer:
        """Read what `save` wrote. Raises ValueError for a file that is missing or is not such json."""
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"path must be a word tokenizer's json, got {str(path)!r}: {error}") from error
        return cls.from_config(config)


class HFTokenizer:
    """A transformers tokenizer (UMT5's for the published model) behind the methods of WordTokenizer.

    path: local folder, or `tokenizer`: an object at hand. mask_id is None where the tokenizer has no mask token.
    """

    def __init__(self, path: str | None = None, *, tokenizer: Any = None) -> None:
        if (path is None) == (tokenizer is None):
            raise ValueError("give either path or tokenizer, got " + ("neither" if path is None else "both"))
        self.path = None if path is None else str(path)
        self.tokenizer = load_hf_tokenizer(str(path)) if tokenizer is None else tokenizer
        self.pad_id, self.eos_id = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self.unk_id, self.mask_id = self.tokenizer.unk_token_id, getattr(self.tokenizer, "mask_token_id", None)
        if self.pad_id is None or self.eos_id is None:
            raise ValueError(f"tokenizer must have a pad and an eos token, got ids {self.pad_id} and {self.eos_id}")

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included (a model's head may have a few rows more)."""
        return len(self.tokenizer)

    def encode(self, text: str, length: int | None = None, *, truncate: bool = False) -> list[int]:
        """Ids of a text, one eos at the end; length and truncate as in WordTokenizer.encode."""
        ids = list(self.tokenizer(_string(text)).input_ids)
        if ids and ids[-1] == self.eos_id:
            ids.pop()
        return _finish(ids, self.eos_id, self.pad_id, length, truncate)

    def decode(self, ids: Sequence[int] | torch.Tensor, *, stop_at_eos: bool = True) -> str:
        """Text of ids up to the first eos (or all of them), pads dropped."""
        ids = _id_list(ids, None)
        if stop_at_eos and self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self.tokenizer.decode([index for index in ids if index not in (self.eos_id, self.pad_id)])

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that come out with an unk token."""
        words = dict.fromkeys(_string(text).split())
        return [word for word in words if self.unk_id is not None and self.unk_id in self.encode(word)]

    def to_config(self) -> dict[str, Any]:
        """Plain values for json. Raises ValueError for one made from an object, not a folder."""
        if self.path is None:
            raise ValueError("an HFTokenizer has a config only when made from a path, got one made from an object")
        return {"type": "hf", "path": self.path}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HFTokenizer:
        """Inverse of `to_config`."""
        if set(config) - {"type"} != {"path"}:
            raise ValueError(f'an hf tokenizer config must be {{"type": "hf", "path": ...}}, got {dict(config)}')
        return cls(config["path"])


def load_hf_tokenizer(path: str) -> Any:
    """A transformers tokenizer from a local folder; no code of the folder runs. ValueError where it cannot be."""
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ValueError("this tokenizer needs the package transformers: pip install transformers") from error
    if not os.path.isdir(path):
        raise ValueError(f"path must be a folder with a transformers tokenizer, got {path!r}")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a folder that holds something else
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"path must be a folder with a transformers tokenizer, got {path!r}: {reason}") from error


def _finish(ids: list[int], eos: int, pad: int, length: int | None, truncate: bool) -> list[int]:
    if length is None:
        return [*ids, eos]
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if len(ids) >= length:
        if not truncate:
            raise ValueError(f"text must have at most length - 1 = {length - 1} tokens, got {len(ids)}")
        ids = ids[: length - 1]
    return [*ids, eos] + [pad] * (length - len(ids) - 1)


def _id_list(ids: Sequence[int] | torch.Tensor, size: int | None) -> list[int]:
    numbers = [int(i) for i in (ids.tolist() if isinstance(ids, torch.Tensor) else ids)]
    for index in numbers:
        if index < 0 or (size is not None and index >= size):
            raise ValueError(f"ids must be in [0, {size if size is not None else 'vocab_size'}), got {index}")
    return numbers

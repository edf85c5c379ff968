"""Tokenizers: round trips, special ids, files."""

import json
import types

import numpy as np
import pytest
import torch

from uvg_engine.media import HFTokenizer, WordTokenizer, tokenizer_from_config
from uvg_engine.media.tokenizer import normalise, split_words

SENTENCE = "a red seven, moving right."


@pytest.fixture
def tokenizer():
    return WordTokenizer.from_texts([SENTENCE, "It bounces: off the upper-left corner! Why? it's a 7"])


def test_round_trip(tokenizer):
    assert tokenizer.decode(tokenizer.encode(SENTENCE)) == SENTENCE
    text = "  A RED seven ,bounces off the upper-left corner !  It\u2019s a 7. "
    assert normalise(text) == "a red seven, bounces off the upper-left corner! it's a 7."
    assert tokenizer.decode(tokenizer.encode(text)) == normalise(text) == normalise(normalise(text))
    assert split_words("") == [] and tokenizer.encode("") == [tokenizer.eos_id] and tokenizer.decode([1]) == ""


def test_special_ids(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id) == (0, 1, 2, 3)
    assert tokenizer.encode("red green") == [tokenizer.encode("red")[0], 2, 1]
    assert tokenizer.unknown_words("A green red green cat.") == ["green", "cat"]
    assert 3 not in tokenizer.encode("<mask> <pad>")  # a text cannot name a special token
    assert tokenizer.decode([3, 0, 2, 1, 4]) == "<mask> <unk>"
    assert tokenizer.decode([3, 1, 3], stop_at_eos=False) == "<mask> <mask>"
    assert tokenizer.decode(torch.tensor(tokenizer.encode(SENTENCE, 12))) == SENTENCE
    assert max(tokenizer.encode(" ".join(tokenizer.words))) == tokenizer.vocab_size - 1


def test_texts_are_strings(tokenizer):
    texts = np.array(["a red seven", "it bounces"])  # as a column of a table comes
    assert tokenizer.encode(texts[0]) == tokenizer.encode("a red seven")
    assert WordTokenizer.from_texts(texts).words == ("a", "bounces", "it", "red", "seven")
    hf = HFTokenizer(tokenizer=StubTokenizer())
    for bad in (texts, 3, None, ["red"], b"red"):
        for call in (tokenizer.encode, tokenizer.unknown_words, hf.encode, hf.unknown_words):
            with pytest.raises(ValueError, match=f"text must be a string, got {type(bad).__name__}"):
                call(bad)
    for bad in ("red", [3], 3):
        with pytest.raises(ValueError, match="texts must be a list of strings, got"):
            WordTokenizer.from_texts(bad)


def test_length(tokenizer):
    ids = tokenizer.encode("a red seven", 6)
    assert len(ids) == 6 and ids[3:] == [1, 0, 0]
    assert len(tokenizer.encode("a red seven", 4)) == 4
    with pytest.raises(ValueError, match=r"at most length - 1 = 2 tokens, got 3"):
        tokenizer.encode("a red seven", 3)
    assert tokenizer.encode("a red seven", 3, truncate=True)[2] == 1
    with pytest.raises(ValueError, match="length"):
        tokenizer.encode("", 0)
    for bad in ([tokenizer.vocab_size], [-1]):
        with pytest.raises(ValueError, match="ids must be"):
            tokenizer.decode(bad)


def test_vocabulary_is_checked():
    for bad in (["red", "red"], ["Red"], ["two words"], [""], [3], ["<mask>"]):
        with pytest.raises(ValueError, match="vocabulary"):
            WordTokenizer(bad)


def test_files(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert WordTokenizer.load(path).words == tokenizer.words
    assert tokenizer_from_config(json.loads(path.read_text())).encode(SENTENCE) == tokenizer.encode(SENTENCE)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    before = path.read_text()
    with pytest.raises(TypeError):
        broken = WordTokenizer(["red"])
        broken.words = (object(),)
        broken.save(path)
    assert path.read_text() == before and len(list(tmp_path.iterdir())) == 1
    for text in ("", "[1]", '{"type": "word"}', "\x00"):
        path.write_text(text)
        with pytest.raises(ValueError, match="tokenizer"):
            WordTokenizer.load(path)
    with pytest.raises(ValueError, match="json"):
        WordTokenizer.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="type must be"):
        tokenizer_from_config({"type": "bpe"})


class StubTokenizer:
    pad_token_id, eos_token_id, unk_token_id, mask_token_id = 0, 1, 2, None

    def __call__(self, text):
        return types.SimpleNamespace(input_ids=[*({"red": 5, "seven": 6}.get(w, 2) for w in text.split()), 1])

    def __len__(self):
        return 7

    def decode(self, ids):
        return " ".join({5: "red", 6: "seven", 2: "<unk>"}[i] for i in ids)


def test_hf_wrapper_has_the_same_interface():
    tokenizer = HFTokenizer(tokenizer=StubTokenizer())
    assert tokenizer.encode("red seven", 5) == [5, 6, 1, 0, 0]
    assert tokenizer.decode([5, 6, 1, 5]) == "red seven"
    assert tokenizer.decode([5, 1, 0, 6], stop_at_eos=False) == "red seven"
    assert tokenizer.vocab_size == 7 and tokenizer.mask_id is None
    assert tokenizer.unknown_words("red cat") == ["cat"]
    with pytest.raises(ValueError, match="made from a path"):
        tokenizer.to_config()


def test_hf_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "seven": 4}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    made.save_pretrained(tmp_path / "tok")
    tokenizer = tokenizer_from_config({"type": "hf", "path": str(tmp_path / "tok")})
    assert tokenizer.encode("red seven", 4) == [3, 4, 1, 0] and tokenizer.decode([3, 4, 1]) == "red seven"
    assert tokenizer_from_config(tokenizer.to_config()).vocab_size == 5
    (tmp_path / "empty").mkdir()
    for bad in ("empty", "missing"):
        with pytest.raises(ValueError, match="folder with a transformers tokenizer"):
            HFTokenizer(str(tmp_path / bad))

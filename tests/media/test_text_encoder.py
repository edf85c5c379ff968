"""Text encoders: the hash encoder's bits are fixed; the UMT5 wrapper equals transformers on a tiny random model."""

import numpy as np
import pytest
import torch

from uvg_engine.media import HashTextEncoder, UMT5TextEncoder, text_encoder_from_config
from uvg_engine.media.text_encoder import _word_vector


def test_vectors_are_the_same_everywhere():
    """Known answers: a change of these numbers changes what every trained model reads."""
    known = [0.19645482301712036, -1.548675775527954, -1.110831379890442, -0.5736395120620728]
    assert _word_vector("red", 4).tolist() == known
    assert _word_vector("sept", 2).tolist() == [-1.2175098657608032, 0.7194926738739014]


def test_shapes_and_norms():
    encoder = HashTextEncoder(text_dim=64, max_len=5)
    red, long, empty = encoder.encode(["red", "a b c d e f g", "  "])
    assert red.shape == (1, 64) and long.shape == (5, 64) and red.dtype == torch.float32
    assert torch.equal(empty, encoder.null()) and not encoder.null().any() and encoder.null().shape == (1, 64)
    position = torch.cat([torch.full((32,), 0.5), torch.zeros(32)])
    assert (red[0] - position).norm().item() == pytest.approx(8.0, abs=1e-5)


def test_case_and_punctuation_as_in_the_tokenizer():
    encoder = HashTextEncoder()
    one, two = encoder.encode(["A red seven, moving", "a RED  seven ,moving"])
    assert torch.equal(one, two) and one.shape[0] == 5
    assert encoder.encode([]) == []


def test_words_differ_and_order_matters():
    words = ["red", "blue", "left", "right", "seven", "fast"]
    vectors = torch.stack([torch.from_numpy(_word_vector(word, 256)) for word in words])
    cosine = vectors @ vectors.T / 256
    assert (cosine - torch.eye(len(words))).abs().max() < 0.3
    encoder = HashTextEncoder()
    one, two = encoder.encode(["red left", "left red"])
    assert not torch.equal(one.flip(0), two)
    big = torch.from_numpy(_word_vector("normal", 4096)).double()
    assert abs(big.mean()) < 0.06 and abs((big**4).mean() - 2.85) < 0.3  # near a normal's 0 and 3


def test_caching_changes_nothing_and_inputs_are_checked():
    encoder = HashTextEncoder()
    first = encoder.encode(["red"])[0].clone()
    encoder.encode(["red"])[0].add_(1)
    assert torch.equal(encoder.encode(["red"])[0], first)
    both = encoder.encode(np.array(["red", "a blue one"]))  # as a column of a table comes
    assert all(map(torch.equal, both, encoder.encode(["red", "a blue one"])))
    for bad in ("red", [3], [None], 3, None, np.array("red"), np.array([b"red"]), np.array([["red"]])):
        with pytest.raises(ValueError, match="list of strings"):
            encoder.encode(bad)
    for bad in ({"text_dim": 7}, {"text_dim": 0}, {"text_dim": 8.0}, {"max_len": 0}, {"max_len": "3"}):
        with pytest.raises(ValueError):
            HashTextEncoder(**bad)


def test_config():
    encoder = text_encoder_from_config({"type": "hash", "text_dim": 32, "max_len": 9})
    assert text_encoder_from_config(encoder.to_config()).to_config() == encoder.to_config()
    for bad in ({"type": "clip"}, {"type": ["hash"]}, {"type": "hash", "dim": 3}, {"type": "umt5", "path": "missing"}):
        with pytest.raises(ValueError):
            text_encoder_from_config(bad)


class StubTokenizer:
    def __call__(self, texts, *, max_length, **_):
        ids = [*(2 + sum(map(ord, word)) % 60 for word in texts[0].split()), 1][:max_length]
        pad = max_length - len(ids)
        return {
            "input_ids": torch.tensor([ids + [0] * pad]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * pad]),
        }


@pytest.fixture(scope="module")
def umt5():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.UMT5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    return transformers.UMT5EncoderModel(config).eval()


@torch.no_grad()
def test_umt5_wrapper(umt5):
    zeroed = UMT5TextEncoder(model=umt5, tokenizer=StubTokenizer(), max_len=8)
    left = UMT5TextEncoder(model=umt5, tokenizer=StubTokenizer(), max_len=8, zero_past_prompt=False)
    rows, rows_left = zeroed.encode(["a red seven"])[0], left.encode([" a  red\nseven "])[0]
    assert rows.shape == (8, 16) and rows.dtype == torch.float32 and zeroed.text_dim == 16
    assert torch.equal(rows[:4], rows_left[:4]) and not rows[4:].any() and rows_left[4:].any()
    batch = StubTokenizer()(["a red seven"], max_length=8)
    want = umt5(input_ids=batch["input_ids"][:, :4]).last_hidden_state[0]
    torch.testing.assert_close(rows[:4], want, rtol=1e-5, atol=1e-5)  # masked pads change nothing
    both = zeroed.encode(["a red seven", "blue"])
    assert torch.equal(both[0], rows) and zeroed.null().shape == (1, 16)
    assert torch.equal(zeroed.encode(["a &amp;amp; b"])[0], zeroed.encode(["a & b"])[0])
    assert len(zeroed.encode(["a b c d e f g h i j"])[0]) == 8
    with pytest.raises(ValueError, match="model and tokenizer"):
        UMT5TextEncoder(model=umt5)
    with pytest.raises(ValueError, match="made from a path"):
        zeroed.to_config()


def test_umt5_from_a_folder(umt5, tmp_path):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3}, unk_token="<unk>")
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    umt5.save_pretrained(tmp_path / "model")
    made.save_pretrained(tmp_path / "tok")
    config = {"type": "umt5", "path": str(tmp_path / "model"), "tokenizer_path": str(tmp_path / "tok"), "max_len": 4}
    encoder = text_encoder_from_config(config)
    assert encoder.to_config() == {**config, "zero_past_prompt": True}
    rows = encoder.encode(["red"])[0]
    assert rows.shape == (4, 16) and rows[0].any() and not rows[1:].any()
    for nowhere in (str(tmp_path / "nothing"), "google/umt5-xxl"):  # a name on a hub is no folder
        with pytest.raises(
            ValueError, match=rf"path must be a folder with a transformers UMT5 encoder, got '{nowhere}'$"
        ):
            text_encoder_from_config({**config, "path": nowhere})
    with pytest.raises(ValueError, match="zero_past_prompt must be true or false, got 'no'"):
        text_encoder_from_config({**config, "zero_past_prompt": "no"})

"""The digits data set: what it promises about determinism, splits, motion and words."""

import random

import numpy as np
import pytest
import torch

from uvg_engine.training.data import digits_text as text
from uvg_engine.training.data.digits import (
    REACH,
    RGB,
    SPRITE,
    DigitAttrs,
    DigitsDataset,
    is_unseen,
    simulate,
    source_images,
    split_indices,
    starts,
    third,
)


@pytest.fixture(scope="module")
def train():
    return DigitsDataset("train", seed=5).batch(range(600))


def test_splits_share_no_image_and_cover_all():
    train, heldout = split_indices("train"), split_indices("heldout")
    assert (len(train), len(heldout)) == (1501, 296)
    assert sorted([*train, *heldout]) == list(range(1797))
    labels = source_images()[1]
    assert min(np.bincount(labels[heldout], minlength=10)) >= 29


def test_clips_use_their_own_split(train):
    assert {a.image for a in train["attrs"]} <= set(split_indices("train").tolist())
    heldout = DigitsDataset("heldout", seed=5).batch(range(200))["attrs"]
    assert {a.image for a in heldout} <= set(split_indices("heldout").tolist())


@pytest.mark.parametrize("augment", [False, True])
def test_a_sample_depends_on_seed_split_and_index_only(augment):
    data = DigitsDataset("train", seed=2**64 - 1, augment=augment)
    batch = data.batch([7, 100_000, 3])
    again = DigitsDataset("train", seed=2**64 - 1, augment=augment).item(100_000)
    assert torch.equal(batch["frames"][1], again.frames)
    assert (batch["prompts"][1], batch["captions"][1], batch["attrs"][1]) == (again.prompt, again.caption, again.attrs)
    assert data.item(7).attrs != data.item(8).attrs
    assert data.item(7).attrs != DigitsDataset("train", seed=0).item(7).attrs


def test_augmentation_changes_pixels_only():
    plain, bent = DigitsDataset("train", 1).batch(range(20)), DigitsDataset("train", 1, augment=True).batch(range(20))
    assert plain["attrs"] == bent["attrs"] and plain["captions"] == bent["captions"]
    assert not torch.equal(plain["frames"], bent["frames"])


def test_unseen_combinations_stay_out_of_training(train):
    triples = [(d, c, k) for d in range(10) for c in range(8) for k in range(9) if is_unseen(d, c, k)]
    assert len(triples) == 72
    assert all(a.seen for a in train["attrs"])
    half = DigitsDataset("heldout").batch(range(100))["attrs"]
    assert [a.seen for a in half] == [i % 2 == 0 for i in range(100)]
    assert not any(a.seen for a in DigitsDataset("heldout", combinations="unseen").batch(range(50))["attrs"])


def test_every_value_occurs(train):
    def values(field):
        return {getattr(a, field) for a in train["attrs"]}

    assert values("digit") == set(range(10)) and values("color") == set(text.COLORS)
    assert values("direction") == set(text.DIRECTIONS) and values("speed") == {None, "slow", "fast"}
    assert values("start") == values("end") == set(text.PLACES) and values("bounces") == {0, 1, 2}
    assert all((a.speed is None) == (a.direction == "still") for a in train["attrs"])


def test_frames_show_one_color_on_black(train):
    frames = train["frames"]
    assert frames.dtype == torch.uint8 and frames.shape == (600, 8, 32, 32, 3)
    for clip, attrs in list(zip(frames.float(), train["attrs"]))[:50]:
        color = torch.tensor(RGB[attrs.color]) / 255
        gray = clip.amax(dim=-1)
        assert (clip - gray[..., None] * color).abs().max() <= 1
        assert (gray > 0).sum(dim=(1, 2)).max() <= SPRITE * SPRITE


@pytest.mark.parametrize("velocity", range(-2, 3))
@pytest.mark.parametrize("place", range(3))
def test_starts_leave_no_doubt(velocity, place):
    options = starts(velocity, place)
    assert options
    for start in options:
        track, bounces = simulate(start, velocity)
        assert [track[1] - track[0], track[2] - track[1]] == [velocity, velocity]
        assert third(start) == place and bounces <= 1 and 0 <= min(track) <= max(track) <= REACH
        assert start % 4 == 0
        assert all(abs(p - border) >= 0.5 for p in (start, track[-1]) for border in (REACH / 3, 2 * REACH / 3))


def test_simulate_reflects_the_position():
    assert simulate(13, 2) == ([13, 15, 15, 13, 11, 9, 7, 5], 1)
    assert simulate(4, 0) == ([4] * 8, 0)


def test_words_are_few_and_texts_short(train):
    words = set(text.vocabulary())
    assert len(words) <= 120
    for prompt, caption in zip(train["prompts"], train["captions"]):
        prompt_tokens, caption_tokens = text.tokens(prompt), text.tokens(caption)
        assert set(prompt_tokens) | set(caption_tokens) <= words
        assert len(prompt_tokens) + 1 <= text.MAX_PROMPT_TOKENS
        assert len(caption_tokens) + 1 <= text.MAX_CAPTION_TOKENS


def test_parsers_read_back_what_was_written(train):
    omitted = 0
    for prompt, caption, attrs in zip(train["prompts"], train["captions"], train["attrs"]):
        found = text.parse_caption(caption)
        assert found == {key: getattr(attrs, key) for key in found}
        found = text.parse_prompt(prompt)
        assert [found[k] for k in ("digit", "color", "direction")] == [attrs.digit, attrs.color, attrs.direction]
        assert found["speed"] in (attrs.speed, None)
        omitted += found["speed"] != attrs.speed
    assert 30 < omitted < 130  # 15 % of the moving ones


def test_the_sentence_of_the_readme_can_occur():
    attrs = DigitAttrs(7, "red", "right", "fast", "left", "right", 0)
    rng = random.Random(0)
    assert "a red seven moving right, fast" in {text.make_prompt(attrs, rng) for _ in range(5000)}


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("A RED 7, moving to the Right... quickly!", (7, "red", "right", "fast")),
        ("an orange eight at rest", (8, "orange", "still", None)),
        ("a blue three that does not move", (3, "blue", "still", None)),
        ("green five, left and down", (5, "green", "down-left", None)),
        ("one two red blue up down", (None, None, None, None)),
        ("", (None, None, None, None)),
        ("\x00 <unk> <unk> ,,, 99999999999999 the the", (None, None, None, None)),
    ],
)
def test_parse_prompt_takes_any_sentence(sentence, expected):
    assert tuple(text.parse_prompt(sentence).values()) == expected


def test_parse_caption_takes_garbage():
    rng, words = random.Random(1), text.vocabulary()
    for _ in range(300):
        text.parse_caption(" ".join(rng.choices(words, k=rng.randrange(30))))
    half = text.parse_caption("a red seven starts at the top left, moves up fast, bouncing and ends at the")
    assert (half["start"], half["end"], half["bounces"], half["direction"]) == ("top left", None, None, "up")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split must be"),
        ({"split": "heldout", "augment": True}, "augment must be False"),
        ({"combinations": "some"}, "combinations must be"),
        ({"seed": -1}, "seed must be"),
        ({"size": 0}, "size must be"),
        ({"augment": "no"}, "augment must be True or False, got 'no'"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"size": 10.5}, "size must be an integer"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataset(**arguments)


def test_length_ends_the_iteration():
    data = DigitsDataset("train", size=3)
    assert len(data) == len(list(data)) == 3
    assert data.batch([])["frames"].shape == (0, 8, 32, 32, 3)
    with pytest.raises(IndexError, match="index must be"):
        data[3]

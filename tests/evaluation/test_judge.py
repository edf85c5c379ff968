"""The judge on real held-out clips, whole, dim and grainy."""

import numpy as np
import pytest
import torch

from uvg_engine.evaluation.judge import judge
from uvg_engine.training.data.digits import DigitsDataset

FIELDS = ("digit", "color", "direction", "speed", "start", "end", "bounces")


@pytest.fixture(scope="module")
def clips():
    batch = DigitsDataset("heldout", seed=11, combinations="all").batch(range(100))
    return batch["frames"].numpy(), batch["attrs"]


def accuracy(frames, attrs):
    verdicts = [judge(clip) for clip in frames]
    return {k: np.mean([v[k] == getattr(a, k) for v, a in zip(verdicts, attrs)]) for k in FIELDS}


@pytest.mark.parametrize("damage", ["none", "dim", "grain"])
def test_judge_reads_real_clips(clips, damage):
    frames, attrs = clips
    if damage == "dim":
        frames = (frames * 0.5).astype(np.uint8)
    elif damage == "grain":
        noise = np.random.Generator(np.random.Philox(1)).normal(0, 25, frames.shape)
        frames = np.clip(frames + noise, 0, 255).astype(np.uint8)
    got = accuracy(frames, attrs)
    assert got["digit"] >= 0.96, got
    assert min(got[k] for k in ("color", "direction", "speed", "bounces")) >= 0.99, got
    assert min(got["start"], got["end"]) >= 0.96, got


def test_judge_takes_torch_and_is_sure_of_a_clear_clip(clips):
    verdict = judge(torch.from_numpy(clips[0][0]))
    assert set(verdict) == {*FIELDS, "confidence"}
    assert set(verdict["confidence"]) == {"digit", "color", "motion"}
    assert min(verdict["confidence"].values()) > 0.5


def test_a_dark_clip_shows_nothing():
    verdict = judge(np.zeros((8, 32, 32, 3), dtype=np.uint8))
    assert all(verdict[k] is None for k in FIELDS) and set(verdict["confidence"].values()) == {0.0}


def test_any_pixels_get_a_verdict():
    rng = np.random.Generator(np.random.Philox(2))
    judge(rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    judge(np.full((8, 32, 32, 3), 255, dtype=np.uint8))


@pytest.mark.parametrize("shape", [(7, 32, 32, 3), (8, 32, 32), (8, 64, 64, 3)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="frames must be uint8"):
        judge(np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ValueError, match="got float64"):
        judge(np.zeros((8, 32, 32, 3)))

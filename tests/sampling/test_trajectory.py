"""What is recorded on the way: which steps, at which times, and that it changes nothing."""

import dataclasses

import pytest
import torch
from tiny import alone, bits, make_engine, make_video

from uvg_engine.flow import FlowSettings, plan
from uvg_engine.media import trajectory_picture
from uvg_engine.sampling import Request

REQUESTS = {
    "generate": Request("generate", "a red seven", seed=1, num_steps=6, shift=2.0),
    "unipc": Request("generate", "a red seven", seed=1, num_steps=6, shift=2.0, solver="unipc"),
    "caption": Request("caption", video=make_video(), seed=1, num_steps=6),
    "joint": Request("joint", "a red seven", seed=1, num_steps=6),
    "progress": Request("joint", "a red seven", seed=1, num_steps=6, text_rule="progress"),
}


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def record(engine, name, keep):
    return alone(engine, dataclasses.replace(REQUESTS[name], trajectory=keep))


def total(name):
    return 7 if name == "progress" else 6  # one more forward at time 0


@pytest.mark.parametrize("name", REQUESTS)
def test_every_step(engine, name):
    result = record(engine, name, True)
    way = result.trajectory
    assert way.steps == tuple(range(1, total(name) + 1)) and len(way.labels) == len(way.times) == total(name)
    assert list(way.times) == sorted(way.times) and way.times[-1] == 1 and way.labels[-1] == "t 1.00"
    if name == "caption":
        assert way.frames is None and way.times[0] == pytest.approx(1 / 6)
    else:
        assert all(f.shape == result.frames.shape and f.dtype == torch.uint8 for f in way.frames)
        assert torch.equal(way.frames[-1], result.frames) and not torch.equal(way.frames[0], result.frames)
    if name in ("generate", "unipc"):
        assert way.texts is None
    else:
        assert way.texts[-1] == engine.decode(result.tokens, stop_at_eos=False) and len(set(way.texts)) > 1
    picture = trajectory_picture(way.frames, way.texts, way.labels)
    assert picture.dtype == torch.uint8 and picture.shape[-1] == 3


@pytest.mark.parametrize("name", ["generate", "caption", "joint"])
def test_a_result_prints_without_its_pixels(engine, name):
    shown = repr(record(engine, name, 2))
    assert "seed=1" in shown and "steps=(1, 6)" in shown and "tensor" not in shown


@pytest.mark.parametrize("name", REQUESTS)
def test_recording_changes_nothing(engine, name):
    plain = record(engine, name, False)
    assert plain.trajectory is None
    for keep in (True, 1, 3):
        assert bits(dataclasses.replace(record(engine, name, keep), trajectory=None)) == bits(plain)


@pytest.mark.parametrize(
    "keep, steps", [(1, (6,)), (2, (1, 6)), (3, (1, 4, 6)), (6, (1, 2, 3, 4, 5, 6)), (99, (1, 2, 3, 4, 5, 6))]
)
def test_some_steps(engine, keep, steps):
    """A number: that many, evenly, the last among them; each is what recording every step has there."""
    full, some = (record(engine, "joint", k).trajectory for k in (True, keep))
    assert some.steps == steps
    for i, step in enumerate(steps):
        assert some.times[i] == full.times[step - 1] and some.texts[i] == full.texts[step - 1]
        assert torch.equal(some.frames[i], full.frames[step - 1])


def test_frames_are_the_data_estimates(engine):
    """From the noise x the flow, going straight on, ends at x - sigma * v: where one Euler step lands."""
    first = record(engine, "generate", True).trajectory
    one = alone(engine, dataclasses.replace(REQUESTS["generate"], num_steps=1))
    assert torch.equal(first.frames[0], one.frames)
    sigmas = [step.sigma_next for step in plan("generate", FlowSettings(steps=6, shift=2.0)).steps]
    assert first.times == tuple(1 - sigma for sigma in sigmas)


def test_steps_without_a_forward_are_recorded_too(engine):
    way = alone(engine, Request("caption", video=make_video(), seed=3, num_steps=40, trajectory=True)).trajectory
    assert way.steps == tuple(range(1, 41)) and any(a == b for a, b in zip(way.texts, way.texts[1:], strict=False))

"""uvg_engine.evaluation.evaluate with engines whose answers are known."""

from types import SimpleNamespace

import numpy as np
import pytest

from uvg_engine.evaluation import Share, agreement, evaluate
from uvg_engine.training.data.digits import NUM_FRAMES, SIZE, DigitsDataset

N = 24
KEYS = {"caption": ("digit", "color", "direction", "speed", "all"), "generate": ("digit", "color", "direction")}
KEYS |= {"joint": ("agreement",)}


class Known:
    """Answers with real clips: video(i) and text(i) name the clip whose frames and caption answer request i."""

    def __init__(self, video, text=None, n=N, seed=0):
        self.batch = DigitsDataset("heldout", seed).batch(range(n))
        self.video, self.text = video, text or video
        self.calls = []

    def answers(self, job, inputs, seeds, callback, **own):
        self.calls.append((job, len(inputs), seeds, own))
        first = seeds[0] % (1 << 20)
        wanted = self.batch["frames"] if job == "caption" else self.batch["prompts"]
        for place, given in enumerate(inputs):
            same = (
                (given == wanted[first + place]) if isinstance(given, str) else (given == wanted[first + place]).all()
            )
            assert same, "the clips and prompts are those of the held-out split, in order"
        frames, captions = self.batch["frames"], self.batch["captions"]
        indices = range(first, first + len(inputs))
        return [SimpleNamespace(frames=frames[self.video(i)], text=captions[self.text(i)]) for i in indices]

    def caption(self, videos, **own):
        return self.answers("caption", videos, **own)

    def generate(self, prompts, **own):
        return self.answers("generate", prompts, **own)

    def joint(self, prompts, **own):
        return self.answers("joint", prompts, **own)


def differing(n=N, seed=0):
    """For each clip another one that shows something else in every respect that is asked about."""
    attrs = DigitsDataset("heldout", seed).batch(range(n))["attrs"]
    facts = [(a.digit, a.color, a.direction, a.speed) for a in attrs]
    others = [
        next((j for j in range(n) if all(x != y for x, y in zip(facts[i], facts[j], strict=True))), None)
        for i in range(n)
    ]
    assert None not in others
    return others


def test_who_tells_and_shows_the_truth_gets_all():
    result = evaluate(Known(lambda i: i), N)
    assert all(result.share("judge", field).value == 1.0 for field in ("digit", "color", "direction", "speed"))
    assert result.to_dict() == {
        "caption": dict.fromkeys(KEYS["caption"], 1.0),
        "generate": dict.fromkeys(KEYS["generate"], 1.0),
        "joint": {"agreement": 1.0},
        "n": N,
    }
    for field in ("start", "end", "bounces"):
        assert result.share("caption", field).value == 1.0


def test_who_tells_and_shows_something_else_gets_nothing():
    other = differing()
    result = evaluate(Known(lambda i: other[i], lambda i: i), N)
    assert set(result.to_dict()["generate"].values()) == {0.0} and result.share("joint", "all").value == 0.0
    assert result.to_dict()["joint"] == {"agreement": 0.0}
    result = evaluate(Known(lambda i: other[i]), N)
    assert set(result.to_dict()["caption"].values()) == {0.0} == set(result.to_dict()["generate"].values())
    assert result.to_dict()["joint"] == {"agreement": 1.0}, "it agrees with itself, though not with the prompt"


def test_one_wrong_answer_in_n_shows_where_it_belongs():
    other = differing()
    result = evaluate(Known(lambda i: other[i] if i == 3 else i), N)
    assert result.share("caption", "digit") == Share(N - 1, N) == result.share("generate", "color")
    parts = [result.share("caption", "all", seen=seen) for seen in (True, False)]
    assert parts == [Share(N // 2, N // 2), Share(N // 2 - 1, N // 2)], "clip 3 is of an unseen combination"


class Silent(Known):
    """Says nothing and shows nothing."""

    def answers(self, job, inputs, **own):
        super().answers(job, inputs, **own)
        dark = np.zeros((NUM_FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
        return [SimpleNamespace(frames=dark, text="") for _ in inputs]


def test_silence_is_never_right():
    """Also about digits that stand still and have no speed, and where text and video are silent together."""
    result = evaluate(Silent(lambda i: i), N)
    fields = [(job, field) for job in ("caption", "generate", "joint") for field in result.marks[job]]
    assert {result.share(*each).value for each in fields} == {0.0}


@pytest.mark.parametrize(
    ("text", "agrees"),
    [
        ("a red seven moves up fast", True),
        ("the seven drifts upwards, red and slow", True),
        ("a red six moves up fast", False),
        ("a blue seven moves up fast", False),
        ("a red seven moves up and left fast", False),
        ("a red seven", False),
        ("a red seven, or a six, moves up", False),
        ("", False),
    ],
)
def test_agreement_is_of_digit_color_and_direction(text, agrees):
    assert agreement(text, {"digit": 7, "color": "red", "direction": "up", "speed": "fast"}) is agrees


def test_agreement_with_a_video_that_shows_nothing():
    assert not agreement("", {"digit": None, "color": None, "direction": None})


def test_the_speed_is_asked_only_of_prompts_that_tell_it():
    n = 60
    result = evaluate(Known(lambda i: i, n=n), n)
    batch = DigitsDataset("heldout").batch(range(n))
    told = sum(
        a.direction == "still" or bool({"slow", "slowly", "fast", "quick", "quickly"} & set(p.split()))
        for p, a in zip(batch["prompts"], batch["attrs"], strict=True)
    )
    assert told < n and result.share("generate", "speed").total == told == result.share("joint", "speed").total
    assert result.share("caption", "speed").total == n


def test_seeds_and_settings_reach_the_engine_and_the_batch_changes_nothing():
    whole, parts = Known(lambda i: 0, seed=2), Known(lambda i: 0, seed=2)
    own = {"seed": 2, "num_steps": 3, "guidance": 2.5}
    one, two = evaluate(whole, N, **own), evaluate(parts, N, batch_size=7, **own)
    for measure in one.marks:
        for field in one.marks[measure]:
            assert np.array_equal(one.marks[measure][field], two.marks[measure][field], equal_nan=True)
    assert [size for _, size, _, _ in parts.calls] == [7, 7, 7, 3] * 3
    for engine in (whole, parts):
        seeds = {job: [s for j, _, seeds, _ in engine.calls if j == job for s in seeds] for job in KEYS}
        assert set(map(tuple, seeds.values())) == {tuple(2 * (1 << 20) + i for i in range(N))}
        for job, _, _, given in engine.calls:
            size = {"frames": 8, "height": 32, "width": 32, "num_steps": 3}
            assert given == (size if job == "caption" else {**size, "guidance": 2.5})


def test_another_seed_asks_about_other_clips():
    with pytest.raises(AssertionError, match="in order"):
        evaluate(Known(lambda i: i, seed=1), 2, seed=0)


@pytest.mark.parametrize("changes", [{"n": 0}, {"n": 1 << 21}, {"n": 2.0}, {"seed": -1}, {"batch_size": 0}])
def test_numbers_out_of_range(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=rf"^{name} must be an integer from \d+ to \d+, got "):
        evaluate(Known(lambda i: i), **{"n": N, **changes})


def test_wilson():
    """Published values: Newcombe 1998, table I, method 3 (81 of 263, 15 of 148, 0 of 20, 1 of 29)."""
    for right, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert Share(right, total).interval() == pytest.approx((low, high), abs=5e-5)
    assert Share(1, 29).interval() == pytest.approx((0.0061, 0.1718), abs=5e-5)
    for total in (1, 7, 200):
        low, high = Share(total, total).interval()
        assert high == pytest.approx(1.0) and high <= 1 and Share(0, total).interval()[1] == pytest.approx(1 - low)
    assert Share(0, 0).interval() == (0.0, 1.0) and np.isnan(Share(0, 0).value)

"""What a model reaches on clips it never saw: held-out handwriting, half of it in combinations never trained on.

Three jobs on the same n clips. caption: what the text says of the clip. generate: what the judge sees in the video made
from the clip's prompt. joint: whether the text says what the judge sees in the video that it came with. A missing
answer (a word that is not there, a dark video) is wrong, also where both sides miss it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from uvg_engine.evaluation.judge import judge
from uvg_engine.training.data.digits import NUM_FRAMES, SIZE, DigitsDataset
from uvg_engine.training.data.digits_text import parse_caption, parse_prompt

if TYPE_CHECKING:
    from uvg_engine.sampling import Engine

JOBS = ("caption", "generate", "joint")
KEYS = {  # of Evaluation.to_dict
    "caption": ("digit", "color", "direction", "speed", "all"),
    "generate": ("digit", "color", "direction"),
    "joint": ("agreement",),
}
MAX_CLIPS = 1 << 20  # clips a seed; the next seed has other clips and other noise
_MAX_SEED = (1 << 43) - 1  # times MAX_CLIPS, a seed of the engine is still an int64
_AGREE = ("digit", "color", "direction")
_ALL = ("digit", "color", "direction", "speed")

Facts = dict[str, Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Share:
    """`right` of `total`."""

    right: int
    total: int

    @property
    def value(self) -> float:
        """In [0, 1]; NaN of nothing."""
        return self.right / self.total if self.total else math.nan

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's score interval, of 95 % by default (E. B. Wilson 1927); (0, 1) of nothing."""
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.value
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Right or wrong, clip by clip.

    marks: measure -> field -> float64 [n], 1 right, 0 wrong, NaN not asked. Measures:
    "caption": the text against the clip: digit, color, direction, speed, all (these four), start, end, bounces.
    "generate", "joint": the judge's view of the video against the prompt: digit, color, direction, speed (not asked of
    a prompt that leaves it open), all (what was asked of these four); joint has also agreement: digit, color and
    direction of the text are those that the judge sees in its own video.
    "judge": the judge's view of the real clips, fields as in caption: what a perfect video would score.
    seen: bool [n], False where training never showed the combination of digit, color and direction.
    """

    marks: Mapping[str, Mapping[str, np.ndarray]]
    seen: np.ndarray

    @property
    def n(self) -> int:
        """Number of clips."""
        return len(self.seen)

    def share(self, measure: str, field: str, *, seen: bool | None = None) -> Share:
        """How many are right: of all clips, or of those whose combination training showed (True) or did not (False)."""
        values = self.marks[measure][field]
        if seen is not None:
            values = values[self.seen == seen]
        return Share(int(np.nansum(values)), int((~np.isnan(values)).sum()))

    def to_dict(self) -> dict[str, Any]:
        """The document of `uvg eval --json`: shares in [0, 1] under KEYS, and n."""
        shares = {job: {field: self.share(job, field).value for field in fields} for job, fields in KEYS.items()}
        return {**shares, "n": self.n}


def evaluate(
    engine: Engine,
    n: int = 200,
    *,
    seed: int = 0,
    num_steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 50,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure an engine on `n` held-out clips of 8 frames of 32x32; the same seed gives the same marks.

    num_steps: of all three jobs; guidance: of generate and joint; None: the engine's own. batch_size: clips given to
    the engine at once; changes no mark. progress: called with the job, its steps done and its steps in all. Raises
    ValueError on a number out of range, and where the engine cannot make this size.
    """
    _check("n", n, 1, MAX_CLIPS)
    _check("seed", seed, 0, _MAX_SEED)
    _check("batch_size", batch_size, 1, MAX_CLIPS)
    dataset = DigitsDataset("heldout", seed)
    shape = {"frames": NUM_FRAMES, "height": SIZE, "width": SIZE, "num_steps": num_steps}
    rows: dict[str, list[Facts]] = {measure: [] for measure in (*JOBS, "judge")}
    seen: list[bool] = []
    for job in JOBS:
        own = shape if job == "caption" else {**shape, "guidance": guidance}
        callback = _counter(job, n, progress)
        for start in range(0, n, batch_size):
            indices = range(start, min(start + batch_size, n))
            clips = dataset.batch(indices)
            seeds = [seed * MAX_CLIPS + i for i in indices]
            inputs = list(clips["frames"]) if job == "caption" else clips["prompts"]
            results = getattr(engine, job)(inputs, seeds=seeds, callback=callback, **own)
            for result, prompt, attrs in zip(results, clips["prompts"], clips["attrs"], strict=True):
                rows[job].append(_MARKS[job](result, prompt, attrs.to_dict()))
            if job == "caption":
                verdicts = [judge(clip) for clip in clips["frames"]]
                rows["judge"] += [_compare(v, a.to_dict()) for v, a in zip(verdicts, clips["attrs"], strict=True)]
                seen += [attrs.seen for attrs in clips["attrs"]]
    marks = {
        measure: {field: np.array([row[field] for row in each], dtype=np.float64) for field in each[0]}
        for measure, each in rows.items()
    }
    return Evaluation(marks, np.array(seen))


def agreement(text: str, verdict: Mapping[str, Any]) -> bool:
    """Whether digit, color and direction of a caption are all there and are those of the judge's verdict."""
    said = parse_caption(text)
    return all(said[field] is not None and said[field] == verdict[field] for field in _AGREE)


def _check(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")


def _counter(job: str, n: int, progress: Progress | None) -> Callable[..., None] | None:
    """The engine's callback that adds up the steps of a job's n requests."""
    if progress is None:
        return None
    count = 0

    def callback(done: int, total: int, request: object) -> None:
        nonlocal count
        count += 1
        progress(job, count, total * n)

    return callback


def _compare(said: Facts, truth: Facts) -> Facts:
    """Marks of `said`, as the parser or the judge tells it, against a clip's attributes; a truth of None: not asked.

    A still digit has no speed; "still" in its place, so that saying nothing about the motion is not right.
    """
    said, truth = _with_still(said), _with_still(truth)
    marks = {
        field: math.nan if truth[field] is None else float(said[field] == truth[field])
        for field in (*_ALL, "start", "end", "bounces")
    }
    return {**marks, "all": float(all(marks[field] != 0.0 for field in _ALL))}


def _with_still(facts: Facts) -> Facts:
    return {**facts, "speed": "still"} if facts["direction"] == "still" else facts


def _mark_caption(result: Any, prompt: str, attrs: Facts) -> Facts:
    return _compare(parse_caption(result.text), attrs)


def _mark_video(result: Any, prompt: str, attrs: Facts) -> Facts:
    """Of a video that a prompt asked for: what the prompt tells, which may leave the speed open."""
    marks = _compare(judge(result.frames), {**attrs, "speed": parse_prompt(prompt)["speed"]})
    return {field: marks[field] for field in (*_ALL, "all")}


def _mark_joint(result: Any, prompt: str, attrs: Facts) -> Facts:
    agreed = float(agreement(result.text, judge(result.frames)))
    return {"agreement": agreed, **_mark_video(result, prompt, attrs)}


_MARKS = {"caption": _mark_caption, "generate": _mark_video, "joint": _mark_joint}

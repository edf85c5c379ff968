"""Jobs are schedules: for each step, where both streams are, which of them moves and how.

generate   video noise -> data     text clean, time 0
caption    video clean, time 0     text source -> data, condition zeros
joint      video noise -> data     text source -> data, same time
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from uvg_engine.flow.schedules import JUMP_RULES, Kappa, SigmaSchedule, model_time, progress_probability
from uvg_engine.flow.solvers import HOLD, SOLVERS, Row, solver_rows

KINDS = ("generate", "caption", "joint")
"""The jobs: text to video, video to text, both at once."""


@dataclass(frozen=True)
class FlowSettings:
    """How a job is sampled.

    steps, shift, guidance, solver: the video's ("euler" or "unipc"). text_rule: "euler", "exact" or "progress" (the
    published joint rule, which ends in one more forward at time 0 and argmax). kappa_power: n of kappa_t = t^n.
    caption_shift: the shift of the text's own times while captioning; 1 spaces them evenly.
    Quirks, off by default: round_times (published: model times in bf16), integer_times, sigma_end, sigma_below_one
    (diffusers' UniPC scheduler: True, 1e-3, 1e-6).
    """

    steps: int = 50
    shift: float = 3.0
    guidance: float = 5.0
    solver: str = "euler"
    text_rule: str = "euler"
    kappa_power: float = 1.0
    caption_shift: float = 1.0
    round_times: bool = False
    integer_times: bool = False
    sigma_end: float = 0.0
    sigma_below_one: float = 0.0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if self.text_rule not in JUMP_RULES:
            raise ValueError(f"text_rule must be one of {', '.join(JUMP_RULES)}, got {self.text_rule!r}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")
        for name in ("round_times", "integer_times"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        self.schedule("generate"), self.schedule("caption"), Kappa(self.kappa_power)  # their own errors, told now

    def schedule(self, kind: str) -> SigmaSchedule:
        """The noise levels that a job of this kind follows."""
        if kind == "caption":
            return SigmaSchedule(self.steps, self.caption_shift)
        return SigmaSchedule(self.steps, self.shift, self.sigma_end, self.sigma_below_one)


@dataclass(frozen=True)
class Step:
    """One forward of the model and one `flow_step`.

    index: the step word of the coin and the draw. sigma, sigma_next: of the stream(s) that move. video_time, text_time:
    the model's inputs, 0 to 1000. coefs: the row for flow_step. jump_prob: of each text token. argmax: take the most
    likely token in place of a draw.
    """

    index: int
    sigma: float
    sigma_next: float
    video_time: float
    text_time: float
    video_moves: bool
    text_moves: bool
    coefs: Row
    jump_prob: float
    argmax: bool = False


@dataclass(frozen=True)
class Job:
    """A kind, its steps, and what the model is conditioned on.

    guidance: of the video velocity, 1 where none is used (then no unconditional branch is needed). null_condition:
    the condition is zeros (caption).
    """

    kind: str
    steps: tuple[Step, ...]
    guidance: float
    null_condition: bool

    @property
    def head_evaluations(self) -> float:
        """Expected evaluations of the text head per token: what the coin-first order leaves of len(steps)."""
        return sum(step.jump_prob for step in self.steps)


def plan(kind: str, settings: FlowSettings | None = None) -> Job:
    """The job of this kind: "generate", "caption" or "joint". Raises ValueError on another."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    settings = settings or FlowSettings()
    video, text = kind != "caption", kind != "generate"
    sigmas = settings.schedule(kind).sigmas()
    rows = solver_rows(settings.solver, sigmas) if video else (HOLD,) * settings.steps
    steps = []
    for i in range(settings.steps):
        time = _model_time(sigmas[i], settings)
        jump = _jump(settings, i, sigmas) if text else 0.0
        steps.append(Step(i, sigmas[i], sigmas[i + 1], video * time, text * time, video, text, rows[i], jump))
    if text and settings.text_rule == "progress":
        steps.append(Step(settings.steps, 0.0, 0.0, 0.0, 0.0, False, True, HOLD, 1.0, argmax=True))
    return Job(kind, tuple(steps), settings.guidance if video else 1.0, null_condition=kind == "caption")


def _model_time(sigma: float, settings: FlowSettings) -> float:
    return model_time(sigma, settings.round_times, settings.integer_times)


def _jump(settings: FlowSettings, i: int, sigmas: tuple[float, ...]) -> float:
    if settings.text_rule == "progress":
        return progress_probability(i, settings.steps)
    return Kappa(settings.kappa_power).jump_probability(1 - sigmas[i], 1 - sigmas[i + 1], settings.text_rule)

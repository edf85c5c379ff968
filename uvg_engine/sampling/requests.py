"""What is asked of the engine, and what it gives back."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from uvg_engine.flow import JUMP_RULES, KINDS, SOLVERS, FlowSettings
from uvg_engine.sampling.defaults import check_temperature
from uvg_engine.sampling.trajectory import Trajectory

Video = Tensor | str | os.PathLike
_INT64 = 2**63
# Fields that a job does not have: given to it, they are refused, not ignored.
_FOREIGN = {
    "generate": ("video", "text_rule", "temperature"),
    "caption": ("prompt", "guidance", "solver"),
    "joint": ("video",),
}


@dataclass(frozen=True, eq=False)
class Request:
    """One job of one sample. What is None is the engine's default for this kind of job.

    kind: "generate", "caption" or "joint". prompt: of generate and joint. video: of caption, uint8 [F, H, W, 3] or a
    file. seed: int64; None draws one from the operating system when the request is submitted. num_steps, guidance,
    shift, solver ("euler", "unipc"): of the flow; the shift of a caption spaces the text's own times. text_rule
    ("euler", "exact", "progress") and temperature (0: argmax): of caption and joint. frames, height, width: size in
    pixels; a caption's video is fitted to it. trajectory: True records every step, a number that many of them, evenly.
    Raises ValueError on a field that the job does not have, lacks, or that cannot be.
    """

    kind: str
    prompt: str | None = None
    video: Video | None = None
    seed: int | None = None
    num_steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    solver: str | None = None
    text_rule: str | None = None
    temperature: float | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    trajectory: bool | int = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in _FOREIGN[self.kind]:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} must not be given to {self.kind}, got {getattr(self, name)!r:.80}")
        if self.kind == "caption":
            if not isinstance(self.video, (Tensor, str, os.PathLike)):
                raise ValueError(f"video must be a uint8 tensor or a path, got {type(self.video).__name__}")
        elif not isinstance(self.prompt, str):
            raise ValueError(f"prompt must be a string, got {type(self.prompt).__name__}")
        elif any("\ud800" <= letter <= "\udfff" for letter in self.prompt):  # bytes of the shell that are no UTF-8
            raise ValueError(f"prompt must be Unicode text, got {self.prompt!r:.80}")
        if self.seed is not None:
            check_seed(self.seed)
        for name in ("num_steps", "frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        self._check_number("guidance", -math.inf)
        self._check_number("shift", 0.0)
        for name, choices in (("solver", SOLVERS), ("text_rule", JUMP_RULES)):
            if getattr(self, name) is not None and getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.temperature is not None:
            check_temperature(self.temperature)
        if not isinstance(self.trajectory, int) or self.trajectory < 0:
            raise ValueError(f"trajectory must be True, False or a number of steps, got {self.trajectory!r}")

    def _check_number(self, name: str, above: float) -> None:
        value = getattr(self, name)
        if value is None:
            return
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not (number and value > above):
            raise ValueError(f"{name} must be finite{' and positive' if above == 0 else ''}, got {value!r}")

    def settings(self, defaults: FlowSettings) -> FlowSettings:
        """The engine's settings for this kind, with what the request says in their place."""
        shift = "caption_shift" if self.kind == "caption" else "shift"
        own: dict[str, Any] = {"steps": self.num_steps, "guidance": self.guidance, shift: self.shift}
        own |= {"solver": self.solver, "text_rule": self.text_rule}
        return dataclasses.replace(defaults, **{name: value for name, value in own.items() if value is not None})


@dataclass(frozen=True, eq=False)
class GenerateResult:
    """frames: uint8 [F, H, W, 3]. latent: fp32 [C, f, h, w]. seed: gives the same bits again."""

    prompt: str
    frames: Tensor = field(repr=False)
    fps: float
    seed: int
    latent: Tensor = field(repr=False)
    trajectory: Trajectory | None = None


@dataclass(frozen=True, eq=False)
class CaptionResult:
    """text: up to the first end mark. tokens: all ids, pads included. seed: gives the same bits again."""

    text: str
    tokens: tuple[int, ...]
    seed: int
    trajectory: Trajectory | None = None


@dataclass(frozen=True, eq=False)
class JointResult:
    """A video and its caption from one process; fields as in GenerateResult and CaptionResult."""

    prompt: str
    frames: Tensor = field(repr=False)
    fps: float
    text: str
    tokens: tuple[int, ...]
    seed: int
    latent: Tensor = field(repr=False)
    trajectory: Trajectory | None = None


Result = GenerateResult | CaptionResult | JointResult


def check_seed(seed: Any) -> None:
    """Raise ValueError unless it is an int64."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not -_INT64 <= seed < _INT64:
        raise ValueError(f"seed must be an integer in [-2^63, 2^63), got {seed!r}")


def new_seed() -> int:
    """A seed from the operating system: 53 bits, which also JSON readers with doubles keep whole."""
    return secrets.randbits(53)


def seed_list(seeds: int | Sequence[int] | None, count: int) -> list[int | None]:
    """One seed per request: None for each, a list as it is, or seed, seed + 1, ... from one number."""
    if seeds is None:
        return [None] * count
    if isinstance(seeds, Sequence) and not isinstance(seeds, (str, bytes)):
        if len(seeds) != count:
            raise ValueError(f"seeds must have one entry a request ({count}), got {len(seeds)}")
        return list(seeds)
    check_seed(seeds)
    assert isinstance(seeds, int)
    return [seeds + i for i in range(count)]

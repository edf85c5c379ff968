"""The training file: what is trained, on what, in which stages. Read from YAML, checked before any work starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

TEXT_TARGETS = ("none", "prompt", "caption")
T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One stage. text: none (video-only), prompt (Knowledge Recall) or caption (Capability Refinement).

    generate, caption: shares of samples at the corner that the job uses (clean prompt ids without pads; clean video and no
    condition); same_time: share with one time for both streams, as joint sampling has it; the rest draws independent times.
    condition_dropout: share of null conditions among samples that have noisy video. lambda_v, lambda_t weigh the two means.
    """

    name: str
    text: str
    steps: int
    lr: float
    warmup: int = 100
    schedule: str = "cosine"
    final_lr_ratio: float = 0.05
    generate: float = 0.3
    caption: float = 0.35
    same_time: float = 0.15
    condition_dropout: float = 0.2
    lambda_v: float = 1.0
    lambda_t: float = 1.0

    def __post_init__(self) -> None:
        _require(self.text in TEXT_TARGETS, f"stage {self.name}: text must be one of {TEXT_TARGETS}", self.text)
        _require(self.steps >= 1, f"stage {self.name}: steps must be at least 1", self.steps)
        _require(self.lr > 0, f"stage {self.name}: lr must be positive", self.lr)
        _require(self.warmup >= 0, f"stage {self.name}: warmup must not be negative", self.warmup)
        _require(
            self.schedule in ("cosine", "constant"), f"stage {self.name}: schedule must be cosine or constant", self.schedule
        )
        shares = (self.generate, self.caption, self.same_time)
        ok = min(shares) >= 0 and sum(shares) <= 1 + 1e-9
        _require(ok, f"stage {self.name}: generate, caption and same_time must be shares that sum to 1 at the most", shares)
        _require(0 <= self.condition_dropout <= 1, f"stage {self.name}: condition_dropout must be in [0, 1]", self.condition_dropout)


@dataclass(frozen=True)
class TimeSampling:
    """Times of training. sigma of the video: logit-normal(mean, std); kappa of the text: t^power with t uniform."""

    video_mean: float = 0.0
    video_std: float = 1.0
    text_power: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """The whole run. Unknown or missing names in the YAML are errors that name them.

    model: a named config or a mapping of UniViGUConfig's fields. init: none, or a folder or checkpoint to start from (`wan:PATH`,
    `published:PATH`, `pretrained:DIR`). data: {type: digits, ...} or {type: folder, path: DIR}. codec: {type: pixel, ...}, its statistics fitted on the
    data when absent. source: uniform or mask. dtype: float32 or bfloat16 (matrix products; weights, optimiser and residual stay fp32).
    batch_size: samples per optimiser step, split in `accumulate` equal parts.
    """

    model: Any
    stages: tuple[Stage, ...]
    data: dict[str, Any]
    codec: dict[str, Any]
    text_encoder: dict[str, Any]
    tokenizer: dict[str, Any] = field(default_factory=lambda: {"type": "word"})
    init: str | None = None
    seed: int = 0
    batch_size: int = 32
    accumulate: int = 1
    text_length: int = 28
    source: str = "mask"
    loss: str = "ce"
    times: TimeSampling = TimeSampling()
    dtype: str = "float32"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 0.999
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 20
    defaults: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(len(self.stages) > 0, "stages must not be empty", list(self.stages))
        _require(len({s.name for s in self.stages}) == len(self.stages), "stage names must differ", [s.name for s in self.stages])
        ok = self.batch_size >= 1 and self.accumulate >= 1 and self.batch_size % self.accumulate == 0
        _require(ok, "batch_size must be a positive multiple of accumulate", (self.batch_size, self.accumulate))
        _require(self.source in ("uniform", "mask"), "source must be uniform or mask", self.source)
        _require(self.loss in ("ce", "gkl"), "loss must be ce or gkl", self.loss)
        _require(self.dtype in ("float32", "bfloat16"), "dtype must be float32 or bfloat16", self.dtype)
        _require(0 <= self.ema < 1, "ema must be in [0, 1)", self.ema)
        _require(self.text_length >= 1, "text_length must be at least 1", self.text_length)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """(index of the stage, step within it) of a global step."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        return len(self.stages) - 1, self.stages[-1].steps

    def to_dict(self) -> dict[str, Any]:
        """A dict that yaml and json can write; `from_dict` gives the same config back."""
        values = dataclasses.asdict(self)
        values["stages"] = [dataclasses.asdict(stage) for stage in self.stages]
        values["betas"] = list(self.betas)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Raises ValueError on unknown or missing names and on values out of range."""
        values = dict(values)
        if not isinstance(values.get("stages"), list):
            raise ValueError(f"stages must be a list, got {values.get('stages')!r}")
        values["stages"] = tuple(_build(Stage, "stage", stage) for stage in values["stages"])
        if "times" in values:
            values["times"] = _build(TimeSampling, "times", values["times"])
        if "betas" in values:
            values["betas"] = tuple(values["betas"])
        return _build(cls, "training file", values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainConfig:
        """Read a training file. Raises ValueError with the file's name on anything wrong in it."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"training file must exist, got {path}")
        try:
            values = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} must be YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must be a mapping, got {type(values).__name__}")
        return cls.from_dict(values)


def _build(cls: type[T], what: str, values: Any) -> T:
    if not isinstance(values, dict):
        raise ValueError(f"{what} must be a mapping, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    missing = sorted(
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in values
    )
    if unknown or missing:
        raise ValueError(f"{what} must name known settings, got unknown {unknown}, missing {missing}")
    return cls(**values)


def _require(condition: bool, rule: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{rule}, got {value!r}")

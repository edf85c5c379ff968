"""The training file: what is trained, on what, in which stages. Read from YAML, checked before any work starts."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

TEXT_TARGETS = ("none", "prompt", "caption")
SCHEDULES = ("cosine", "constant")
OPTIMIZERS = ("adamw", "muon")
T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One stage. text: none (video-only), prompt (Knowledge Recall) or caption (Capability Refinement).

    generate, caption: shares of samples at the corner that the job uses (clean prompt ids without pads; clean video
    and no condition); same_time: share with one time for both streams, as joint sampling has it; the rest draws
    independent times. condition_dropout: share of null conditions among samples that have noisy video. lambda_v,
    lambda_t weigh the two means. Raises ValueError on a value of the wrong type or out of range, as all do.
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
        where = f"stage {self.name}: "
        _require_types(self, where)
        _require(self.text in TEXT_TARGETS, f"{where}text must be one of {', '.join(TEXT_TARGETS)}", self.text)
        _require(self.steps >= 1, f"{where}steps must be at least 1", self.steps)
        _require(self.lr > 0, f"{where}lr must be positive", self.lr)
        _require(self.warmup >= 0, f"{where}warmup must not be negative", self.warmup)
        _require(self.schedule in SCHEDULES, f"{where}schedule must be one of {', '.join(SCHEDULES)}", self.schedule)
        _require(0 <= self.final_lr_ratio <= 1, f"{where}final_lr_ratio must be in [0, 1]", self.final_lr_ratio)
        shares = (self.generate, self.caption, self.same_time)
        ok = min(shares) >= 0 and sum(shares) <= 1 + 1e-9
        _require(ok, f"{where}generate, caption and same_time must be shares that sum to 1 at the most", shares)
        ok = 0 <= self.condition_dropout <= 1
        _require(ok, f"{where}condition_dropout must be in [0, 1]", self.condition_dropout)
        _require(self.lambda_v >= 0, f"{where}lambda_v must not be negative", self.lambda_v)
        _require(self.lambda_t >= 0, f"{where}lambda_t must not be negative", self.lambda_t)


@dataclass(frozen=True)
class TimeSampling:
    """Times of training. sigma of the video: logit-normal(mean, std); kappa of the text: t^power with t uniform."""

    video_mean: float = 0.0
    video_std: float = 1.0
    text_power: float = 1.0

    def __post_init__(self) -> None:
        _require_types(self, "times: ")
        _require(self.video_std >= 0, "times: video_std must not be negative", self.video_std)
        _require(self.text_power > 0, "times: text_power must be positive", self.text_power)


@dataclass(frozen=True)
class TrainConfig:
    """The whole run. Unknown or missing names in the YAML are errors that name them.

    model: a named config or a mapping of UniViGUConfig's fields. init: none, or a folder or checkpoint to start from
    (`wan:PATH`, `published:PATH`, `pretrained:DIR`). data: {type: digits, ...} or {type: folder, path: DIR}. codec:
    {type: pixel, ...}, its statistics fitted on the data when absent. source: uniform or mask. dtype: float32 or
    bfloat16 (matrix products; weights, optimiser and residual stay fp32). batch_size: samples per optimiser step, split
    in `accumulate` equal parts. docs/training.md explains every name.
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
    times: TimeSampling = field(default_factory=TimeSampling)
    dtype: str = "float32"
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 0.999
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 20
    defaults: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_types(self, "")
        _require(isinstance(self.model, str | dict), "model must be a name or a mapping of sizes", self.model)
        ok = isinstance(self.init, str | None)
        _require(ok, "init must be null, wan:PATH, published:PATH or pretrained:DIR", self.init)
        _require(len(self.stages) > 0, "stages must not be empty", list(self.stages))
        names = [stage.name for stage in self.stages]
        _require(len(set(names)) == len(names), "stage names must differ", names)
        texts = [stage.text != "none" for stage in self.stages]
        ok = sum(after > before for before, after in zip([False, *texts], texts)) <= 1
        _require(ok, "stages must not leave text out between two with text: the text parts would start anew", texts)
        ok = self.batch_size >= 1 and self.accumulate >= 1 and self.batch_size % self.accumulate == 0
        _require(ok, "batch_size must be a positive multiple of accumulate", (self.batch_size, self.accumulate))
        _require(0 <= self.seed < 1 << 31, "seed must be in [0, 2**31)", self.seed)
        _require(self.source in ("uniform", "mask"), "source must be uniform or mask", self.source)
        _require(self.loss in ("ce", "gkl"), "loss must be ce or gkl", self.loss)
        _require(self.dtype in ("float32", "bfloat16"), "dtype must be float32 or bfloat16", self.dtype)
        ok = self.optimizer in OPTIMIZERS
        _require(ok, f"optimizer must be one of {', '.join(OPTIMIZERS)}", self.optimizer)
        _require(0 <= self.ema < 1, "ema must be in [0, 1)", self.ema)
        _require(self.text_length >= 1, "text_length must be at least 1", self.text_length)
        ok = isinstance(self.betas, tuple) and len(self.betas) == 2
        ok = ok and all(_is(float, beta) and 0 <= beta < 1 for beta in self.betas)
        _require(ok, "betas must be two numbers in [0, 1)", self.betas)
        _require(self.weight_decay >= 0, "weight_decay must not be negative", self.weight_decay)
        _require(self.clip_norm > 0, "clip_norm must be positive", self.clip_norm)
        for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))

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
        values["stages"] = tuple(
            _build(Stage, f"stages[{index}]", stage) for index, stage in enumerate(values["stages"])
        )
        if "times" in values:
            values["times"] = _build(TimeSampling, "times", values["times"])
        if isinstance(values.get("betas"), list):
            values["betas"] = tuple(values["betas"])
        return _build(cls, "training file", values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainConfig:
        """Read a training file. Raises ValueError with the file's name on anything wrong in it."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"training file must exist, got {path}")
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{path} must be YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must be a mapping, got {type(values).__name__}")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def differences(one: Any, two: Any, name: str = "") -> list[str]:
    """Names, as in stages[1].lr, of the settings in which two configs of `to_dict` differ."""
    if isinstance(one, dict) and isinstance(two, dict):
        prefix, absent = f"{name}." if name else "", object()
        names = sorted({*one, *two}, key=str)
        pairs = [(f"{prefix}{key}", one.get(key, absent), two.get(key, absent)) for key in names]
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        pairs = [(f"{name}[{index}]", *pair) for index, pair in enumerate(zip(one, two))]
    else:
        return [] if one == two else [name]
    return [found for inner, a, b in pairs for found in differences(a, b, inner)]


class _Loader(yaml.SafeLoader):
    """YAML as it is, but for a name that a mapping has twice: of the two values one would go without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.MarkedYAMLError(problem=f"found {key.value!r} a second time", problem_mark=key.start_mark)
            names.add(key.value)
        return node


def _build(cls: type[T], what: str, values: Any) -> T:
    if not isinstance(values, dict):
        raise ValueError(f"{what} must be a mapping, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields), key=str)
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


_TYPES = {int: "an integer", float: "a number", str: "a text", dict: "a mapping"}


def _require_types(settings: Any, where: str) -> None:
    """Numbers, texts and mappings are what their annotation says; the other fields have rules of their own."""
    for name, hint in get_type_hints(type(settings)).items():
        value, kind = getattr(settings, name), getattr(hint, "__origin__", hint)
        if kind in _TYPES and not _is(kind, value):
            # YAML 1.1 reads 1e-3, without a dot, as a text
            hint = " (write it with a dot, as 1.0e-3)" if kind is float and _reads_as_number(value) else ""
            raise ValueError(f"{where}{name} must be {_TYPES[kind]}{hint}, got {value!r}")


def _is(kind: type, value: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)


def _reads_as_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False

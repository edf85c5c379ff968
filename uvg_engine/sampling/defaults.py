"""What an engine does unless a call says otherwise; stored in engine.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from uvg_engine.flow import KINDS, FlowSettings
from uvg_engine.media.video import check_fps

SOURCES = ("uniform", "mask")


@dataclass(frozen=True)
class EngineDefaults:
    """Size of the videos, length of the text stream, and how each job is sampled.

    frames, height, width: pixels; fps: of the written file. text_length: tokens of a caption, pads included, and the
    limit of a prompt. name: of the model. source: what text starts from, "uniform" over the vocabulary or "mask" (as it
    was trained). temperature: of the text draws; 1 is exact, 0 is argmax. jobs: FlowSettings per job, as an object or a
    mapping of the fields that differ from its defaults; a job left out has these. Raises ValueError on a value that
    cannot be.
    """

    frames: int
    height: int
    width: int
    text_length: int
    name: str = "model"
    fps: float = 8.0
    source: str = "uniform"
    temperature: float = 1.0
    jobs: Mapping[str, FlowSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "text_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not isinstance(self.name, str):
            raise ValueError(f"name must be a string, got {self.name!r}")
        check_fps(self.fps)
        object.__setattr__(self, "fps", float(self.fps))  # json knows no numbers of numpy
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        check_temperature(self.temperature)
        if not isinstance(self.jobs, Mapping) or set(self.jobs) - set(KINDS):
            raise ValueError(f"jobs must be a mapping of {', '.join(KINDS)}, got {self.jobs!r}")
        jobs = {kind: _settings(kind, self.jobs.get(kind, {})) for kind in KINDS}
        object.__setattr__(self, "jobs", jobs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for json; `from_dict` gives the same defaults back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"jobs": {kind: dataclasses.asdict(job) for kind, job in self.jobs.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineDefaults:
        """Inverse of `to_dict`. Raises ValueError on unknown or missing names."""
        if not isinstance(values, Mapping):
            raise ValueError(f"defaults must be a mapping, got {values!r}")
        fields = {f.name for f in dataclasses.fields(cls)}
        missing = sorted({"frames", "height", "width", "text_length"} - set(values))
        unknown = sorted(set(values) - fields)
        if unknown or missing:
            raise ValueError(f"defaults must name known settings, got unknown {unknown}, missing {missing}")
        return cls(**values)


def check_temperature(value: float) -> None:
    """Raise ValueError unless it is a finite number of at least 0."""
    if not (_is_number(value) and value >= 0):
        raise ValueError(f"temperature must be finite and at least 0, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _settings(kind: str, values: FlowSettings | Mapping[str, Any]) -> FlowSettings:
    if isinstance(values, FlowSettings):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"jobs.{kind} must be a mapping, got {values!r}")
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(FlowSettings)})
    if unknown:
        raise ValueError(f"jobs.{kind} must name fields of FlowSettings, got unknown {unknown}")
    try:
        return FlowSettings(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"jobs.{kind} must be settings of a flow, got {dict(values)!r}: {error}") from error

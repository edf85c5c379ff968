"""What a Uni-ViGU model is made of."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREDICTIONS = ("velocity", "sample")


@dataclass(frozen=True)
class UniViGUConfig:
    """Sizes and quirks of a model. Width D = heads * head_dim.

    heads, head_dim: attention heads and their width. in_channels: latent channels C. text_dim: width of the text
    encoder's rows. freq_dim: width of the time sinusoid. ffn_dim: hidden width of an expert. layers: blocks. vocab: V
    of the text stream. patch: (pf, py, px) latent cells per video token. prediction: what the video head gives,
    "velocity" as Wan does, or "sample", the clean latent, from which the model makes the velocity: easier where a token
    holds nearly as many values as D (T. Li and K. He, arXiv 2511.13720). Quirks of the published code: round_temb (temb
    rounded to bf16 and back), round_time (model times rounded to bf16). Raises ValueError on a size that cannot be.
    """

    heads: int
    head_dim: int
    in_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    layers: int
    vocab: int
    patch: tuple[int, int, int] = (1, 2, 2)
    prediction: str = "velocity"
    round_temb: bool = False
    round_time: bool = False

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "in_channels", "text_dim", "freq_dim", "ffn_dim", "layers", "vocab"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if (
            not isinstance(self.patch, list | tuple)
            or [type(p) for p in self.patch] != [int] * 3
            or min(self.patch) < 1
        ):
            raise ValueError(f"patch must be three positive integers, got {self.patch!r}")
        object.__setattr__(self, "patch", tuple(self.patch))
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {self.prediction!r}")
        for name in ("round_temb", "round_time"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even, got {self.freq_dim}")

    @property
    def dim(self) -> int:
        """Model width D."""
        return self.heads * self.head_dim

    @property
    def patch_volume(self) -> int:
        """Latent cells per video token and channel."""
        return self.patch[0] * self.patch[1] * self.patch[2]

    def to_dict(self) -> dict[str, Any]:
        """A dict that json can write."""
        return {**dataclasses.asdict(self), "patch": list(self.patch)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UniViGUConfig:
        """The inverse of `to_dict`. Raises ValueError on missing or unknown names."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values)
        if unknown or missing:
            raise ValueError(f"config must name each size once, got unknown {unknown}, missing {missing}")
        return cls(**values)

    @classmethod
    def from_json(cls, path: str | Path) -> UniViGUConfig:
        """Read `config.json`. Raises ValueError on text that is not a json object."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} must be a json object, got {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must be a json object, got {type(values).__name__}")
        return cls.from_dict(values)


_WAN: dict[str, Any] = {"head_dim": 128, "in_channels": 16, "text_dim": 4096, "freq_dim": 256, "vocab": 256_300}
CONFIGS = {
    "1.3b": UniViGUConfig(heads=12, ffn_dim=8960, layers=30, **_WAN),
    "14b": UniViGUConfig(heads=40, ffn_dim=13824, layers=40, **_WAN),
    "digits": UniViGUConfig(
        heads=4, head_dim=32, in_channels=24, text_dim=64, freq_dim=64, ffn_dim=512, layers=6, vocab=160
    ),
}
"""Named sizes: Uni-ViGU on Wan2.1 1.3B and 14B, and the embedded model's."""


def named_config(name: str, **changes: Any) -> UniViGUConfig:
    """One of `1.3b`, `14b`, `digits`, with fields replaced. Raises ValueError on another name or field."""
    if name not in CONFIGS:
        raise ValueError(f"config must be one of {', '.join(CONFIGS)}, got {name!r}")
    return UniViGUConfig.from_dict({**CONFIGS[name].to_dict(), **changes})

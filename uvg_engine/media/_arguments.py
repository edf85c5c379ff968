"""Arguments of codecs, tokenizers and text encoders, as callers and engine.json give them."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any, TypeVar

Part = TypeVar("Part")


def of_type(what: str, kinds: Mapping[str, Part], config: Mapping[str, Any]) -> Part:
    """What config["type"] names. Raises ValueError for any other."""
    kind = config.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        names = " or ".join(f'"{name}"' for name in kinds)
        raise ValueError(f"{what} type must be {names}, got {kind!r}")
    return kinds[kind]


def arguments(what: str, kind: str, names: set[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments in a config of this type. Raises ValueError for an unknown key."""
    if config.get("type", kind) != kind:
        raise ValueError(f'{what} config type must be "{kind}", got {config["type"]!r}')
    unknown = set(config) - names - {"type"}
    if unknown:
        raise ValueError(f"{what} config of type {kind} has {sorted(names)}, got unknown {sorted(unknown)}")
    return {name: config[name] for name in names if name in config}


def positive(name: str, value: Any) -> int:
    """An integer, numpy's too. Raises ValueError on another type: 2.5 is not 2."""
    if not is_positive(value):
        raise ValueError(f"{name} must be a positive integer, got {value!r:.80}")
    return int(value)


def is_positive(value: Any) -> bool:
    """Whether it is an integer above 0."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def flag(name: str, value: Any) -> bool:
    """True or False. Raises ValueError on anything else: "no" is not False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r:.80}")
    return value

"""Configurations of kernels: frozen dataclasses in tables by (oldest capability, shape class).

Host functions take them from a `Table` and nowhere else, so that bench/tune.py can search every choice and the tests
see whether what is compiled ahead of time is all that can be chosen. All are untuned: the largest tiles that spilled
nothing. Several have a `maxnreg`, registers that a thread may have: it is told where ptxas, left alone, would rather
spill a few bytes than take them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from uvg_engine.kernels._launch import Capability, capability_of

ANY = 2**63  # bound of the class that takes every number

C = TypeVar("C")
Answer = Callable[["Table[Any]", tuple[Any, ...], Any], Any]
_answer: ContextVar[Answer | None] = ContextVar("uvg_kernels_answer", default=None)


@dataclass(frozen=True)
class Table(Generic[C]):
    """name: module and variable. entries: (oldest capability, *kind, bound) to a configuration.

    kind: what must be equal; bound: the largest number (a width, a count of rows) that the entry is for.
    """

    name: str
    entries: Mapping[tuple[Any, ...], C]
    _found: dict[tuple[Any, ...], tuple[Any, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def on(self, device: torch.device, *shape: Any) -> C:
        """`choose` for the capability of a device."""
        return self.choose(capability_of(device), *shape)

    def choose(self, capability: Capability, *shape: Any) -> C:
        """The entry of the closest bound, and there of the newest chip up to `capability`.

        shape: the kind, and last the number. Raises ValueError where no entry is large enough.
        """
        asked = (capability, *shape)
        key = self._found.get(asked) or self._found.setdefault(asked, self.key(*asked))
        answer = _answer.get()
        return self.entries[key] if answer is None else answer(self, (capability, *key[1:]), self.entries[key])

    def key(self, capability: Capability, *shape: Any) -> tuple[Any, ...]:
        """The key of the entry that `choose` takes."""
        *kind, number = shape
        fits = [key for key in self.entries if [*key[1:-1]] == kind and number <= key[-1] and key[0] <= capability]
        if not fits:
            raise ValueError(f"{self.name} must have an entry for {shape} up to {capability}, got {[*self.entries]}")
        bound = min(key[-1] for key in fits)
        return max(key for key in fits if key[-1] == bound)


@contextlib.contextmanager
def answering(answer: Answer) -> Iterator[None]:
    """Inside, answer(table, (capability, *kind, bound), what the table says) is what is chosen."""
    token = _answer.set(answer)
    try:
        yield
    finally:
        _answer.reset(token)


def options(config: Any) -> dict[str, Any]:
    """The fields of a configuration as options of a launch, those that are None left out."""
    pairs = ((part.name, getattr(config, part.name)) for part in dataclasses.fields(config))
    return {name: value for name, value in pairs if value is not None}

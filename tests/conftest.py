"""Fixtures of several test files: what a test may change and must leave as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from uvg_engine import backends
from uvg_engine.backends import native
from uvg_engine.ops import _plans

os.environ["UVG_KEEP_MEMORY"] = "0"  # what `uvg` asks of its process would outlive a test that runs it in this one


@pytest.fixture
def isa_restored() -> Iterator[None]:
    before = native.info()["cpu"]["isa"]
    yield
    native.core().use_isa(before)


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ops that a backend was chosen for, in order: what a plan does is not among them."""
    seen: list[str] = []
    select = backends.select
    monkeypatch.delenv("UVG_BACKENDS", raising=False)
    monkeypatch.setattr(backends, "select", lambda op, *rest, **more: seen.append(op) or select(op, *rest, **more))
    for planner in _plans.planners.values():
        native.core().plans_forget(planner)
    return seen

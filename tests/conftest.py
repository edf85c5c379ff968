"""Fixtures of several test files: what a test may change and must leave as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Two processes of tests share the cores: threads that wait shall sleep soon (uvg_engine.process). Before torch.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
import torch

from uvg_engine import backends
from uvg_engine.backends import native
from uvg_engine.ops import _plans

# References on a GPU sum in fp32, as on the CPU (and multiply so: torch's products use no TF32 unless told to).
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
os.environ["UVG_KEEP_MEMORY"] = "0"  # what `uvg` asks of its process would outlive a test that runs it in this one


def pytest_collection_finish(session: pytest.Session) -> None:
    """A module whose test waits for a long process of its own may begin that before the first test of all."""
    if not session.config.option.collectonly:
        _call_in_modules(session, "before_all_tests")


def pytest_sessionfinish(session: pytest.Session) -> None:
    _call_in_modules(session, "after_all_tests")


def _call_in_modules(session: pytest.Session, name: str) -> None:
    for module in {item.module for item in session.items if isinstance(item, pytest.Function)}:
        getattr(module, name, lambda: None)()


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

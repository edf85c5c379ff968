"""Fixtures of several test files: what a test may change and must leave as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from uvg_engine.backends import native

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

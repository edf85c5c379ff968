"""The fixture `backend` of tests/ops/test_<op>.py: each backend that has the op, forced; a refusal is a skip. The
CUDA kernels run in the simulator; on a machine with a GPU they and Triton's run there too (gpu_device.py)."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import gpu_device
import pytest
import torch
from harness import backends_of

from uvg_engine import backends

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter

    triton_interpreter.install()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        op = Path(metafunc.module.__file__).stem.removeprefix("test_")
        names = backends_of(op) + (
            gpu_device.names(op) if metafunc.function.__name__ not in gpu_device.NOT_MOVED else []
        )
        metafunc.parametrize("backend", [gpu_device.marked(name) for name in names], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with gpu_device.forced(request.param) as name:
        yield name


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """The native core alone serves."""
    refusal = backends.table("cpu")["linear"].refuses(torch.zeros(1, 1))
    if refusal:
        pytest.skip(refusal)
    with backends.force("cpu"):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    try:
        return (yield)
    except backends.BackendRefused as refusal:
        if "backend" not in getattr(item, "fixturenames", ()):
            raise
        pytest.skip(str(refusal))

"""The native core gives the reference's words, and tells what it is; without it the reason is told."""

import importlib
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from uvg_engine.backends import native
from uvg_engine.reference import philox

needs_core = pytest.mark.skipif(native.cpu() is None, reason=str(native.why_not()))


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_a_module_that_is_there_loads(name):
    """Else all that needs it would be skipped, and the rest pass."""
    folder = Path(native.__file__).parents[1]
    there = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"{name}{suffix}").exists()]
    reason = {"_cpu": native.why_not, "_cuda": native.why_not_cuda}[name]()
    assert not there or reason is None


@needs_core
def test_philox_equals_reference():
    gen = torch.Generator().manual_seed(0)
    for row in torch.randint(0, 2**32, (64, 6), generator=gen).tolist():
        want = tuple(int(word) for word in philox.philox4x32(*(torch.tensor(value) for value in row)))
        assert tuple(native.cpu().philox4x32(row[:4], row[4:])) == want


@needs_core
@pytest.mark.parametrize("counter, key", [((0, 0, 0), (0, 0)), ((0, 0, 0, 2**32), (0, 0)), ((0, 0, 0, -1), (0, 0))])
def test_philox_refuses_what_is_no_word(counter, key):
    with pytest.raises(TypeError):
        native.cpu().philox4x32(counter, key)


def describe(**env):
    """(exit code, output) of the module's own report under `env`."""
    command = [sys.executable, "-m", "uvg_engine.backends.native"]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@needs_core
def test_instruction_set_is_the_strongest_and_can_be_lowered():
    found = native.info()
    usable = [isa for isa in found["cpu"]["supported"] if isa in found["build"]["isa"]]
    assert usable[0] == "generic"
    if not os.environ.get("UVG_CPU_ISA"):
        assert found["cpu"]["isa"] == usable[-1]
    for isa in usable:
        code, text = describe(UVG_CPU_ISA=isa)
        assert code == 0 and f"uses {isa} " in text


@needs_core
@pytest.mark.parametrize("wish", ["sse9", "AVX2", "neon,avx2"])
def test_unknown_instruction_set_is_an_error(wish):
    code, text = describe(UVG_CPU_ISA=wish)
    assert (
        code != 0
        and f"UVG_CPU_ISA must be one of generic, neon, neon_bf16, avx2, avx512, avx512_bf16, got '{wish}'" in text
    )


@needs_core
def test_instruction_set_of_another_cpu_is_an_error():
    foreign = "neon" if "neon" not in native.info()["cpu"]["supported"] else "avx2"
    code, text = describe(UVG_CPU_ISA=foreign)
    assert code != 0 and f"got '{foreign}'" in text and "this CPU and this build have" in text


def test_absence_is_told(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    native._load.cache_clear()
    monkeypatch.setattr(importlib, "import_module", absent)
    try:
        assert native.cpu() is None
        assert native.describe().startswith("pure Python: the native core was not built")
    finally:
        native._load.cache_clear()


@pytest.mark.parametrize(
    "driver, runtime, reason",
    [
        (0, 13000, "no NVIDIA driver is loaded"),
        (12080, 13000, "the driver serves CUDA 12.8; the kernels need 13.0 or newer"),
        (13000, 13020, None),
        (14010, 13000, None),
    ],
)
def test_a_driver_that_is_too_old_is_told(monkeypatch, driver, runtime, reason):
    monkeypatch.setattr(native, "cuda", lambda: SimpleNamespace(versions=lambda: (driver, runtime)))
    native.why_no_driver.cache_clear()
    try:
        assert native.why_no_driver() == reason
    finally:
        native.why_no_driver.cache_clear()

"""How setup.py finds nvcc, for which GPUs it builds, and what it says: with an nvcc that only lists what it knows."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from setuptools.errors import SetupError

SETUP = Path(__file__).resolve().parents[1] / "setup.py"
LEFT_OUT = (
    "uvg_engine CUDA kernels: left out: no nvcc on PATH, in CUDA_HOME or from PyPI; "
    "pip install 'nvidia-cuda-nvcc>=13' 'nvidia-cuda-cccl>=13' brings one\n"
)


@pytest.fixture
def build(monkeypatch, tmp_path):
    """cuda_options of setup.py on a machine without CUDA, and a way to put an nvcc somewhere."""
    for name in ("CUDA_HOME", "UVG_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **given: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    made = runpy.run_path(str(SETUP))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setattr(made["sysconfig"], "get_path", lambda kind: str(tmp_path / "site"))

    def nvcc(folder, archs=(75, 80, 90, 100, 120)):
        path = tmp_path / folder / "nvcc"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n" + "".join(f"echo compute_{arch}\n" for arch in archs))
        path.chmod(0o755)
        return str(path)

    return made["cuda_options"], nvcc


def test_without_nvcc_it_says_what_is_left_out_and_how_to_get_it(build, capfd):
    options, _ = build
    assert options() == () and capfd.readouterr().err == LEFT_OUT


@pytest.mark.parametrize("folder", [".", "site/nvidia/cu13/bin"])
def test_nvcc_on_path_or_from_pypi_builds_for_three_gpus(build, capfd, folder):
    options, nvcc = build
    path = os.path.normpath(nvcc(folder))
    made = [os.path.normpath(option) for option in options()]
    assert made == [f"-DUVG_NVCC={path}", "-DUVG_CUDA_ARCHS=80;90;100"]
    assert capfd.readouterr().err.endswith("nvcc, for sm_80, sm_90, sm_100 and PTX\n")


def test_cuda_home_goes_first(build, monkeypatch, tmp_path):
    options, nvcc = build
    nvcc(".")
    wanted = nvcc("toolkit/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert options()[0] == f"-DUVG_NVCC={wanted}"


@pytest.mark.parametrize(
    "wish, archs", [("90", "90"), ("80,120", "80;120"), ("none", None)], ids=["one", "several", "none"]
)
def test_the_gpus_may_be_chosen(build, monkeypatch, capfd, wish, archs):
    options, nvcc = build
    nvcc(".")
    monkeypatch.setenv("UVG_CUDA_ARCHS", wish)
    assert options()[1:] == ((f"-DUVG_CUDA_ARCHS={archs}",) if archs else ())
    if archs is None:
        assert capfd.readouterr().err == "uvg_engine CUDA kernels: left out: UVG_CUDA_ARCHS=none\n"


def test_an_older_nvcc_builds_for_what_it_knows(build, monkeypatch):
    options, nvcc = build
    nvcc(".", archs=(75, 80, 90))
    assert options()[1] == "-DUVG_CUDA_ARCHS=80;90"
    options.cache_clear()
    monkeypatch.setenv("UVG_CUDA_ARCHS", "100")
    with pytest.raises(SetupError, match=r"^UVG_CUDA_ARCHS must be of 75, 80, 90 for .*nvcc, got '100'$"):
        options()


def test_gpus_that_are_asked_for_need_an_nvcc(build, monkeypatch):
    options, _ = build
    monkeypatch.setenv("UVG_CUDA_ARCHS", "90")
    with pytest.raises(SetupError, match=r"^UVG_CUDA_ARCHS=90 asks for the CUDA kernels, but: no nvcc on PATH"):
        options()


@pytest.mark.parametrize("arch, known", [("90", True), ("91", False)])
def test_gpu_check_asks_whether_nvcc_knows_the_gpu(build, arch, known):
    """By functions of setup.py, imported: where that set something up, gpu_check would build for every GPU."""
    _, nvcc = build
    nvcc(".")
    (asks,) = re.findall(r'known="(import setup.*)"', (SETUP.parent / "bench/gpu_check.sh").read_text())
    command = [sys.executable, "-c", asks.replace("$arch", arch)]
    done = subprocess.run(command, cwd=SETUP.parent, capture_output=True, text=True, check=False)
    assert (done.returncode == 0, done.stdout, done.stderr) == (known, "", "")

"""What the build makes of a checkout: native or pure Python, each told, and every file that the package needs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from uvg_engine.backends import native

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    *("uvg_engine", "kernels", "csrc", "cmake"),
    *("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"),
)
COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")

pytest.importorskip("setuptools", minversion="77")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy without anything built."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, folder / name)
    (folder / "uvg_engine/embedded/model/deep").mkdir(parents=True)
    (folder / "uvg_engine/embedded/model/deep/weights.bin").write_bytes(b"weights")
    return folder


def wheel(checkout, target, **env):
    """(exit code, what was said, the wheel or None), by the call that pip makes in its build environment."""
    command = [sys.executable, "-c", f"from setuptools.build_meta import build_wheel; build_wheel({str(target)!r})"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UVG_") and name != "CXX"}
    done = subprocess.run(command, cwd=checkout, env=clean | env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, next(target.glob("*.whl"), None)


def path_without_compilers(folder):
    """A PATH with all that is on this one's, but no compiler."""
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(place).glob("*"):
            link = folder / program.name
            if program.name not in COMPILERS and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


@pytest.fixture(scope="module")
def pure(checkout, tmp_path_factory):
    """The wheel without native modules."""
    code, said, made = wheel(checkout, tmp_path_factory.mktemp("pure"), UVG_NATIVE="0")
    assert code == 0 and "native core: not built, installing pure Python: UVG_NATIVE=0" in said
    return made


def test_pure_python_is_complete(checkout, pure):
    assert pure.name.endswith("-py3-none-any.whl")
    held = set(zipfile.ZipFile(pure).namelist())
    modules = {str(path.relative_to(checkout)) for path in (checkout / "uvg_engine").rglob("*.py")}
    assert modules <= held
    assert {
        "uvg_engine/kernels/__init__.py",
        "uvg_engine/py.typed",
        "uvg_engine/embedded/model/deep/weights.bin",
    } <= held
    assert [name for name in held if name.split("/")[0] not in ("uvg_engine",) and ".dist-info/" not in name] == []


# An editable installation would give what the unpacked wheel lacks, the core as well.
NOT_EDITABLE = (
    "import sys; sys.meta_path[:] = [x for x in sys.meta_path if 'editable' not in getattr(x, '__module__', '')]"
)
# What looks for the core, or has another way without it: the choice of a backend, checks of values, a call's short way.
WITHOUT_CORE = ("ops", "cli/test_sampling_commands.py", "test_backends.py", "test_dispatch.py", "test_native.py")
OF_THESE = "autocast or test_sampling_commands or test_backends or test_dispatch or test_native"


@pytest.mark.slow
@pytest.mark.skipif(native.cpu() is None, reason="all tests run without the native core here")
def test_pure_python_serves(pure, tmp_path):
    """A part of the tests on the unpacked wheel, in processes that have no core."""
    site = tmp_path / "site"
    zipfile.ZipFile(pure).extractall(site)
    (site / "sitecustomize.py").write_text(NOT_EDITABLE)
    (site / "bench").symlink_to(ROOT / "bench")
    of_uvg = {name for name in os.environ if name.startswith("UVG_")}
    env = {name: value for name, value in os.environ.items() if name not in of_uvg}
    env |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def python(*args):
        command = [sys.executable, *args]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        return done.stdout.strip().splitlines()

    found = python("-c", "from uvg_engine.backends import native; print(native.__file__, native.describe(), sep='\\n')")
    assert Path(found[0]).is_relative_to(site) and found[1].startswith("pure Python: the native core was not built")
    which = f"{OF_THESE} or (mistake and (reference or sdpa))"
    options = ("-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "-o", f"pythonpath={site}")
    last = python("-m", "pytest", *options, "-k", which, *(str(ROOT / "tests" / name) for name in WITHOUT_CORE))[-1]
    assert " passed" in last, last


def test_without_a_compiler_the_reason_is_told(checkout, tmp_path):
    (tmp_path / "bin").mkdir()
    bare = path_without_compilers(tmp_path / "bin")
    code, said, made = wheel(checkout, tmp_path, PATH=bare)
    assert code == 0 and "native core: not built, installing pure Python: no C++ compiler" in said
    assert made.name.endswith("-py3-none-any.whl")
    made.unlink()
    code, said, made = wheel(checkout, tmp_path, PATH=bare, UVG_NATIVE="1")
    assert code != 0 and made is None and "UVG_NATIVE=1 asks for the native core, but: no C++ compiler" in said


@pytest.mark.parametrize(
    "env, message",
    [
        ({"UVG_NATIVE": "yes"}, "UVG_NATIVE must be auto, 0 or 1, got 'yes'"),
        ({"CXX": "no-such-compiler"}, "CXX must name a C++ compiler, got 'no-such-compiler'"),
        ({"UVG_CUDA_ARCHS": "hopper"}, "UVG_CUDA_ARCHS must be none or numbers like 80,90,100, got 'hopper'"),
        ({"UVG_CUDA_ARCHS": "80", "CUDA_HOME": "nowhere"}, "CUDA_HOME must hold bin/nvcc, got 'nowhere'"),
    ],
    ids=["wish", "compiler", "archs", "cuda"],
)
def test_a_wrong_wish_is_an_error(checkout, tmp_path, env, message):
    code, said, made = wheel(checkout, tmp_path, **env)
    assert code != 0 and made is None and message in said


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler to name")
@pytest.mark.parametrize("another", [False, True])
def test_another_compiler_begins_anew(checkout, tmp_path, another):
    """CMake would go on with the one that its cache names."""
    pytest.importorskip("pybind11")
    programs, build = tmp_path / "bin", tmp_path / "build"
    programs.mkdir(), build.mkdir()
    for name, does in (("cmake", "exit 1"), ("mine", 'exec c++ "$@"')):
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    (build / "CMakeCache.txt").write_text(
        f"CMAKE_HOME_DIRECTORY:INTERNAL={checkout}\nCMAKE_GENERATOR:INTERNAL=Ninja\n"
        f"CMAKE_COMMAND:INTERNAL={programs / 'cmake'}\n"
        f"CMAKE_CXX_COMPILER:FILEPATH={'/usr/bin/c++' if another else programs / 'mine'}\n"
    )
    env = {"CXX": str(programs / "mine"), "UVG_BUILD_DIR": str(build), "UVG_CUDA_ARCHS": "none"}
    code, said, _ = wheel(checkout, tmp_path, PATH=os.pathsep.join([str(programs), os.environ["PATH"]]), **env)
    assert code != 0 and "the native core did not build" in said
    assert (build / "CMakeCache.txt").exists() is not another

"""Calls CMake for the native core; everything else about the package stands in pyproject.toml.

UVG_NATIVE=auto (default): build it; without cmake, pybind11, a C++ compiler or Python's headers install pure Python.
UVG_NATIVE=1: build it or fail. UVG_NATIVE=0: pure Python. Code that does not compile fails the install in any case
but 0. UVG_BUILD_DIR keeps the CMake tree at a place of yours, UVG_CMAKE_ARGS is passed on.

The CUDA kernels are built where an nvcc is found: CUDA_HOME, PATH, or PyPI's nvidia-cuda-nvcc. UVG_CUDA_ARCHS says for
which GPUs, "80,90,100" unless given, and demands them; "none" leaves them out. What came of it:
`python -m uvg_engine.backends.native`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
EXTENSIONS = [Extension("uvg_engine._cpu", sources=[])]
CUDA_ARCHS = ("80", "90", "100")
PROBE = "#include <Python.h>\n#include <vector>\nint main() { return std::vector<int>(1, 0)[0]; }\n"


def find_tool(name: str) -> str | None:
    """A program on PATH, or the one that pip put beside this interpreter."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def find_compiler() -> str | None:
    if "CXX" in os.environ:
        wish = os.environ["CXX"]
        if not wish.split() or not shutil.which(shlex.split(wish)[0]):
            raise SetupError(f"CXX must name a C++ compiler, got {wish!r}")
        return wish
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def missing() -> str | None:
    """What keeps this machine from building native code, or None."""
    if not find_tool("cmake"):
        return "no cmake"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        headers = [f"-I{sysconfig.get_path(kind)}" for kind in ("include", "platinclude")]
        command = [*shlex.split(compiler), "-std=c++17", *headers, "-c", str(source), "-o", f"{source}.o"]
        probe = subprocess.run(command, capture_output=True, text=True, check=False)
    if probe.returncode == 0:
        return None
    return f"{compiler} does not compile a program that includes Python.h: {probe.stderr.strip()[:300]}"


@functools.cache
def build_native() -> bool:
    """Whether to build the native core; says why not."""
    wish = os.environ.get("UVG_NATIVE", "auto")
    if wish not in ("auto", "0", "1"):
        raise SetupError(f"UVG_NATIVE must be auto, 0 or 1, got {wish!r}")
    reason = "UVG_NATIVE=0" if wish == "0" else missing()
    if reason and wish == "1":
        raise SetupError(f"UVG_NATIVE=1 asks for the native core, but: {reason}")
    state = f"not built, installing pure Python: {reason}" if reason else "building with CMake"
    print(f"uvg_engine native core: {state}", file=sys.stderr, flush=True)
    return not reason


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, on PATH, or of PyPI's wheels, which lie in site-packages."""
    if "CUDA_HOME" in os.environ:
        wish = str(Path(os.environ["CUDA_HOME"], "bin", "nvcc"))
        if not shutil.which(wish):
            raise SetupError(f"CUDA_HOME must hold bin/nvcc, got {os.environ['CUDA_HOME']!r}")
        return wish
    sites = dict.fromkeys([*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    wheels = [str(Path(site, "nvidia", "cu13", "bin")) for site in sites if site]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(wheels))


def known_archs(nvcc: str) -> set[str]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    return set(re.findall(r"compute_(\w+)", listed.stdout))


@functools.cache
def cuda_options() -> tuple[str, ...]:
    """What CMake is told about CUDA, nothing where the kernels are left out; says which."""
    wish = os.environ.get("UVG_CUDA_ARCHS")
    if wish is not None and not re.fullmatch(r"none|\d+[af]?(,\d+[af]?)*", wish):
        raise SetupError(f"UVG_CUDA_ARCHS must be none or numbers like 80,90,100, got {wish!r}")
    nvcc = None if wish == "none" else find_nvcc()
    if nvcc is None:
        lacking = "no nvcc on PATH, in CUDA_HOME or from PyPI"
        lacking += "; pip install 'nvidia-cuda-nvcc>=13' 'nvidia-cuda-cccl>=13' brings one"
        if wish not in (None, "none"):
            raise SetupError(f"UVG_CUDA_ARCHS={wish} asks for the CUDA kernels, but: {lacking}")
        reason = "UVG_CUDA_ARCHS=none" if wish else lacking
        print(f"uvg_engine CUDA kernels: left out: {reason}", file=sys.stderr, flush=True)
        return ()
    known = known_archs(nvcc)
    archs = wish.split(",") if wish else [arch for arch in CUDA_ARCHS if arch in known]
    unknown = [arch for arch in archs if arch not in known]
    if unknown or not archs:
        raise SetupError(f"UVG_CUDA_ARCHS must be of {', '.join(sorted(known))} for {nvcc}, got {','.join(archs)!r}")
    print(f"uvg_engine CUDA kernels: {nvcc}, for sm_{', sm_'.join(archs)} and PTX", file=sys.stderr, flush=True)
    return f"-DUVG_NVCC={nvcc}", f"-DUVG_CUDA_ARCHS={';'.join(archs)}"


class UvgDistribution(Distribution):
    """Has its extension module only where it can be built; asked when something is built, not before."""

    def has_ext_modules(self) -> bool:
        return build_native()


class CMakeBuild(build_ext):
    """One run of CMake makes both modules."""

    def finalize_options(self) -> None:
        if self.distribution.ext_modules and build_native() and cuda_options():
            self.distribution.ext_modules = [*EXTENSIONS, Extension("uvg_engine._cuda", sources=[])]
        super().finalize_options()

    def build_extension(self, ext: Extension) -> None:
        if ext.name != EXTENSIONS[0].name:
            return
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(os.environ.get("UVG_BUILD_DIR", self.build_temp)).resolve()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        forget_foreign_cache(build_dir, "Ninja" if ninja else None)
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build_dir)),
            *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DUVG_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *(cuda_options() or ["-DUVG_NVCC="]),
            *shlex.split(os.environ.get("UVG_CMAKE_ARGS", "")),
        ]
        jobs = ["-j", str(self.parallel)] if self.parallel else []
        for command in (configure, [cmake, "--build", str(build_dir), *jobs]):
            if subprocess.run(command, check=False).returncode:
                told = "the native core did not build (the reason is above; UVG_NATIVE=0 installs without it)"
                raise SetupError(f"{told}: {shlex.join(command)}")


class EditableWheel(editable_wheel):
    def run(self) -> None:
        built = {"_cpu": build_native(), "_cuda": build_native() and bool(cuda_options())}
        for module in (name for name, made in built.items() if not made):
            for stale in (ROOT / "uvg_engine").glob(f"{module}.*.so"):
                stale.unlink()  # an earlier build would go on being imported
        super().run()


def forget_foreign_cache(build_dir: Path, generator: str | None) -> None:
    """Drop a CMake cache of another checkout, Python, generator or compiler, or of a cmake that is gone (pip's build
    environments come and go)."""
    cache = build_dir / "CMakeCache.txt"
    if not cache.exists():
        return
    entries = dict(line.partition("=")[::2] for line in cache.read_text().splitlines() if "=" in line)
    compilers = {value for name, value in entries.items() if name.startswith("CMAKE_CXX_COMPILER:")}
    wish = shlex.split(os.environ.get("CXX", ""))  # which CMake asks for once
    ours = (
        entries.get("CMAKE_HOME_DIRECTORY:INTERNAL") == str(ROOT)
        and entries.get("Python_EXECUTABLE:UNINITIALIZED", sys.executable) == sys.executable
        and (generator is None or entries.get("CMAKE_GENERATOR:INTERNAL") == generator)
        and (not wish or shutil.which(wish[0]) in compilers)
        and Path(entries.get("CMAKE_COMMAND:INTERNAL", "")).is_file()
    )
    if not ours:
        cache.unlink()
        shutil.rmtree(build_dir / "CMakeFiles", ignore_errors=True)


if __name__ == "__main__":  # bench/gpu_check.sh asks the functions above
    setup(
        packages=[*find_packages(include=["uvg_engine", "uvg_engine.*"]), "uvg_engine.kernels"],
        package_dir={"uvg_engine.kernels": "kernels"},
        ext_modules=EXTENSIONS,
        cmdclass={"build_ext": CMakeBuild, "editable_wheel": EditableWheel},
        distclass=UvgDistribution,
    )

"""How many blocks a multiprocessor holds at once, by NVIDIA's own calculator (`cuda_occupancy.h`); needs no GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "csrc/tests/occupancy.cpp"


@dataclass(frozen=True)
class Launch:
    """Threads and bytes of shared memory of a block, registers of a thread."""

    threads: int
    registers: int
    shared: int


def missing() -> str | None:
    """Why the calculator cannot be built here, or None."""
    if _compiler() is None:
        return "no C++ compiler"
    return (
        None if _header() else "no cuda_occupancy.h: of a CUDA toolkit, of PyPI's nvcc (extra cuda-build) or of Triton"
    )


def blocks_per_sm(capability: tuple[int, int], shared_of_sm: int, launches: Sequence[Launch]) -> list[int]:
    """Blocks of each launch that a multiprocessor with `shared_of_sm` bytes of shared memory holds at once.

    Raises RuntimeError where the calculator is missing, or does not know the capability.
    """
    chip = f"{capability[0]} {capability[1]} {shared_of_sm}"
    lines = [f"{chip} {one.threads} {one.registers} {one.shared}\n" for one in launches]
    done = subprocess.run([_program()], input="".join(lines), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuda_occupancy.h must know capability {capability} and the launches, got {launches[:3]}")
    return [int(line) for line in done.stdout.split()]


def _compiler() -> str | None:
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


@functools.cache
def _header() -> Path | None:
    """The folder of cuda_occupancy.h."""
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    places += [Path(os.environ[name], "include") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places += [Path(site, "nvidia", "cu13", "include") for site in sys.path if site]
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    return next((place for place in places if (place / "cuda_occupancy.h").is_file()), None)


_kept: list[tempfile.TemporaryDirectory[str]] = []  # with the program in it, until this process ends


@functools.cache
def _program() -> str:
    if reason := missing():
        raise RuntimeError(f"the occupancy calculator is not to be had: {reason}")
    _kept.append(tempfile.TemporaryDirectory())
    path = Path(_kept[0].name, "occupancy")
    subprocess.run([str(_compiler()), "-std=c++17", "-O1", f"-I{_header()}", str(SOURCE), "-o", str(path)], check=True)
    return str(path)

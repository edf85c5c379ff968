"""The native modules `uvg_engine._cpu` and `uvg_engine._cuda`: each of them, or why it is not there.

`python -m uvg_engine.backends.native` prints which of the two this installation has.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

_NOT_BUILT = {
    "_cpu": "the native core was not built: at install time there was no C++ compiler, cmake or Python header, or "
    "UVG_NATIVE=0 was set (UVG_NATIVE=1 pip install . builds it or says what it lacks)",
    "_cuda": "the CUDA kernels were not built: at install time there was no nvcc on PATH, in CUDA_HOME or from PyPI "
    "(pip install 'nvidia-cuda-nvcc>=13' 'nvidia-cuda-cccl>=13', then install uvg_engine again)",
}


_stand_in: ContextVar[Any] = ContextVar("uvg_engine_stand_in_core", default=None)


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"uvg_engine.{name}"), None
    except ModuleNotFoundError as error:
        if error.name != f"uvg_engine.{name}":
            raise
        return None, _NOT_BUILT[name]
    except ImportError as error:
        return None, f"the native module {name} does not load: {error}"


def cpu() -> ModuleType | None:
    """The native CPU module, or None; `why_not` then tells the reason."""
    return _load("_cpu")[0]


def cuda() -> ModuleType | None:
    """The module of the CUDA kernels, or None; `why_not_cuda` then tells the reason. It needs no GPU to be loaded."""
    return _load("_cuda")[0]


def core() -> Any:
    """The native CPU module, or what stands in for it. Raises RuntimeError with the reason where there is none."""
    module = _stand_in.get() or cpu()
    if module is None:
        raise RuntimeError(why_not())
    return module


@contextlib.contextmanager
def standing_in(other: Any) -> Iterator[None]:
    """Inside, in this thread, `core` returns something else, which looks on; None: the module itself."""
    token = _stand_in.set(other)
    try:
        yield
    finally:
        _stand_in.reset(token)


def why_not() -> str | None:
    """Why there is no native CPU module, or None where there is one."""
    return _load("_cpu")[1]


def why_not_cuda() -> str | None:
    """Why there is no module of CUDA kernels, or None where there is one."""
    return _load("_cuda")[1]


@functools.cache
def why_no_driver() -> str | None:
    """Why this machine's driver runs none of the CUDA kernels, or None. The kernels bring their own CUDA runtime, and a
    driver serves runtimes of its own major version and older ones."""
    module = cuda()
    if module is None:
        return why_not_cuda()
    driver, runtime = module.versions()
    if driver == 0:
        return "no NVIDIA driver is loaded"
    if driver // 1000 >= runtime // 1000:
        return None
    return f"the driver serves CUDA {_dotted(driver)}; the kernels need {runtime // 1000}.0 or newer"


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def info() -> dict[str, Any]:
    """Build and CPU of the native core: version, compiler, instruction sets, OpenMP; or {"reason": ...} without it.
    Under "cuda" the same of the CUDA kernels: version, compiler, GPUs compiled for.

    Raises ValueError where UVG_CPU_ISA names an instruction set that this CPU or build does not have.
    """
    gpu = cuda()
    kernels = {"reason": why_not_cuda()} if gpu is None else gpu.build_info()
    module = cpu()
    if module is None:
        return {"reason": why_not(), "cuda": kernels}
    return {"build": module.build_info(), "cpu": module.cpu_features(), "cuda": kernels}


def describe() -> str:
    """One line for people: what is in use, or what is missing. Raises as `info` does."""
    found = info()
    if "reason" in found:
        return f"pure Python: {found['reason']}"
    build, features = found["build"], found["cpu"]
    return (
        f"native {build['version']}, {build['compiler']}, uses {features['isa']} out of "
        f"{', '.join(build['isa'])}, OpenMP {'on' if build['openmp'] else 'off'}"
    )


def describe_cuda() -> str:
    """One line for people about the CUDA kernels."""
    found = info()["cuda"]
    if "reason" in found:
        return f"CUDA left out: {found['reason']}"
    return f"CUDA {found['version']}, {found['compiler']}, for sm_{', sm_'.join(found['archs'].split(','))} and PTX"


if __name__ == "__main__":
    print(describe())
    print(describe_cuda())

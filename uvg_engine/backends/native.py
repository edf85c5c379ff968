"""The native CPU core `uvg_engine._cpu`: the module, or why it is not there.

`python -m uvg_engine.backends.native` prints which of the two this installation is.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

_NOT_BUILT = (
    "the native core was not built: at install time there was no C++ compiler, cmake or Python header, or "
    "UVG_NATIVE=0 was set (UVG_NATIVE=1 pip install . builds it or says what it lacks)"
)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("uvg_engine._cpu"), None
    except ModuleNotFoundError as error:
        if error.name != "uvg_engine._cpu":
            raise
        return None, _NOT_BUILT
    except ImportError as error:
        return None, f"the native core does not load: {error}"


def cpu() -> ModuleType | None:
    """The native CPU module, or None; `why_not` then tells the reason."""
    return _load()[0]


def core() -> ModuleType:
    """The native CPU module. Raises RuntimeError with the reason where there is none."""
    module = cpu()
    if module is None:
        raise RuntimeError(why_not())
    return module


def why_not() -> str | None:
    """Why there is no native CPU module, or None where there is one."""
    return _load()[1]


def info() -> dict[str, Any]:
    """Build and CPU of the native core: version, compiler, instruction sets, OpenMP; or {"reason": ...} without it.

    Raises ValueError where UVG_CPU_ISA names an instruction set that this CPU or build does not have.
    """
    module = cpu()
    if module is None:
        return {"reason": why_not()}
    return {"build": module.build_info(), "cpu": module.cpu_features()}


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


if __name__ == "__main__":
    print(describe())

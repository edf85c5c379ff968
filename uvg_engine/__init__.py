"""uvg_engine: a fast engine for Uni-ViGU models. Importing it imports nothing heavy; `Engine` loads at first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uvg_engine.sampling import (
        CaptionResult,
        Engine,
        EngineDefaults,
        GenerateResult,
        Handle,
        JointResult,
        Request,
        SamplingError,
        Savings,
        Scheduler,
        Trajectory,
    )

__version__ = "0.1.0"
__all__ = [
    "CaptionResult",
    "Engine",
    "EngineDefaults",
    "GenerateResult",
    "Handle",
    "JointResult",
    "Request",
    "SamplingError",
    "Savings",
    "Scheduler",
    "Trajectory",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from uvg_engine import sampling

        return getattr(sampling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

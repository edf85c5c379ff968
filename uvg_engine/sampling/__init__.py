"""Sampling: requests, the packed loop, the scheduler, and the engine that a user holds."""

from uvg_engine.sampling.defaults import EngineDefaults
from uvg_engine.sampling.engine import Engine
from uvg_engine.sampling.requests import CaptionResult, GenerateResult, JointResult, Request
from uvg_engine.sampling.savings import Savings
from uvg_engine.sampling.scheduler import Handle, SamplingError, Scheduler
from uvg_engine.sampling.trajectory import Trajectory

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
]

"""Training: stages, data, loop, checkpoints, and what becomes of a run."""

from uvg_engine.training.config import Stage, TimeSampling, TrainConfig
from uvg_engine.training.loop import Trainer
from uvg_engine.training.publish import engine_parts, find_checkpoint

__all__ = ["Stage", "TimeSampling", "TrainConfig", "Trainer", "engine_parts", "find_checkpoint"]

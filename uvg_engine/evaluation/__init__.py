"""Evaluation: what a model reaches, measured from pixels and from text."""

from uvg_engine.evaluation.evaluate import Evaluation, Share, agreement, evaluate
from uvg_engine.evaluation.judge import judge

__all__ = ["Evaluation", "Share", "agreement", "evaluate", "judge"]

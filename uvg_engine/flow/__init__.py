"""Flows: schedules, paths, solvers and the jobs made of them. No model and no random numbers in here."""

from uvg_engine.flow.jobs import KINDS, FlowSettings, Job, Step, plan
from uvg_engine.flow.paths import MixturePath, step_marginal, transition_rows
from uvg_engine.flow.schedules import JUMP_RULES, Kappa, SigmaSchedule, model_time, progress_probability
from uvg_engine.flow.solvers import HOLD, SOLVERS, solver_rows

__all__ = [
    "HOLD",
    "JUMP_RULES",
    "KINDS",
    "SOLVERS",
    "FlowSettings",
    "Job",
    "Kappa",
    "MixturePath",
    "SigmaSchedule",
    "Step",
    "model_time",
    "plan",
    "progress_probability",
    "solver_rows",
    "step_marginal",
    "transition_rows",
]

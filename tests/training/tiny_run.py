"""The smallest runs that still do everything: two layers of width 32, eight video tokens, a handful of steps."""

import json
import multiprocessing
from pathlib import Path

import torch

from uvg_engine.training.config import TrainConfig
from uvg_engine.training.loop import Trainer

# Forks children from a server that has imported everything: they cost no start of an interpreter. The last module is
# what the first optimiser of a process imports, which takes seconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["uvg_engine.training.loop", "uvg_engine.cli", "sklearn.datasets", "torch.utils.tensorboard", "torch._dynamo"]
)
TINY = {
    "model": {"heads": 2, "head_dim": 16, "text_dim": 16, "freq_dim": 16, "ffn_dim": 48, "layers": 2},
    "data": {"type": "digits", "augment": True},
    "codec": {"type": "pixel", "block": [4, 8, 8], "keep": [1, 1, 1], "mean": [-14.9] * 3, "std": [2.7] * 3},
    "text_encoder": {"type": "hash", "text_dim": 16, "max_len": 8},
    "seed": 3,
    "batch_size": 4,
    "text_length": 12,
}


def stage(name="video", text="none", steps=2, **changes):
    """A stage's mapping; lr 1e-2 without warm-up unless told otherwise."""
    return {"name": name, "text": text, "steps": steps, "lr": 1e-2, "warmup": 0, **changes}


def tiny(*stages, **changes):
    """A TrainConfig of these stages (default: one of video, one of each text) with settings replaced."""
    stages = stages or (stage(), stage("recall", "prompt"), stage("refine", "caption"))
    return TrainConfig.from_dict({**TINY, "stages": list(stages), **changes})


def trained(config, folder, *stops):
    """The trainer at the end of a run that was given up at each of `stops` and resumed by a new trainer."""
    for resume, stop in enumerate((*stops, None)):
        trainer = Trainer(config, folder, resume=bool(resume))
        trainer.run(stop_at=stop)
    return trainer


def log_of(folder):
    """The lines of a run's log as dicts, without the rate, which is not a number of the training."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "samples_per_s"} for line in lines]


def assert_same(one, two, where="state"):
    """Nested states are equal, tensors bitwise."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for index, pair in enumerate(zip(one, two)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    else:
        assert one == two, where


def assert_same_run(one, two):
    """Two trainers hold the same state, bitwise, but for the rates of steps not yet logged."""
    states = [trainer.state() for trainer in (one, two)]
    windows = [[{**log, "samples_per_s": 0.0} for log in state.pop("window")] for state in states]
    assert_same(*states)
    assert repr(windows[0]) == repr(windows[1])  # repr: nan is equal to itself

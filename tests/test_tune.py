"""The logic of the search for configurations; the search itself needs a GPU, and says so."""

from dataclasses import dataclass

import pytest
import torch

from bench import tune


@dataclass(frozen=True)
class Config:
    BLOCK_M: int = 64
    BLOCK_D: int = 2048
    num_warps: int = 4
    num_stages: int = 1
    tma: bool = False


def test_neighbours_differ_in_one_field_and_stay_within_limits():
    found = set(tune.neighbours(Config()))
    assert found == {
        *(Config(BLOCK_M=32), Config(BLOCK_M=128)),
        *(Config(num_warps=2), Config(num_warps=8)),
        *(Config(num_stages=2), Config(tma=True)),
    }
    assert Config(num_warps=64) not in set(tune.neighbours(Config(num_warps=32)))


def test_search_combines_what_gains_and_stops():
    def seconds(configs):
        return [(1 if c.BLOCK_M == 256 else 2 + abs(c.BLOCK_M - 256) / 256) / (2 if c.tma else 1) for c in configs]

    best, gained = tune.search(Config(), seconds)
    assert best == Config(BLOCK_M=256, tma=True) and gained == pytest.approx(2.75 * 2)
    assert tune.search(Config(), lambda configs: [1.0] * len(configs)) == (Config(), 1.0)
    noise = lambda configs: [1.0, *[0.99] * (len(configs) - 1)]  # noqa: E731
    assert tune.search(Config(), noise) == (Config(), 1.0)


def test_what_does_not_run_never_wins():
    default, *_ = tune.search(Config(), lambda configs: [1.0, *[float("inf")] * (len(configs) - 1)])
    assert default == Config()


def test_choices_are_noted_and_answered():
    def some_config(rows, backward=False):
        return Config(num_warps=rows)

    choices = tune.Choices(some_config)
    assert choices(2) == Config(num_warps=2) and choices(4, backward=True) == Config(num_warps=4)
    assert list(choices.asked) == ["some_config(2)", "some_config(4, backward=True)"]
    choices.set["some_config(2)"] = Config(tma=True)
    assert choices(2) == Config(tma=True) and choices(4, backward=True) == Config(num_warps=4)


def test_config_functions_are_there():
    pytest.importorskip("triton")
    import importlib

    from uvg_engine import backends

    for op in set(tune.CONFIG_FUNCTIONS) & set(backends.table("triton")):
        assert callable(getattr(importlib.import_module(f"uvg_engine.kernels.{op}"), tune.CONFIG_FUNCTIONS[op]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 1
    assert "sees no GPU here" in capsys.readouterr().out


def test_an_unknown_op_is_refused(capsys):
    with pytest.raises(SystemExit):
        tune.main(["softmax"])
    assert "no configuration of softmax is searched" in capsys.readouterr().err

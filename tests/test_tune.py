"""The logic of the search for configurations; the search itself needs a GPU, and says so."""

from dataclasses import dataclass

import pytest
import torch

from bench import tune
from uvg_engine import backends
from uvg_engine.backends import triton


@dataclass(frozen=True)
class Config:
    BLOCK_M: int = 64
    BLOCK_D: int = 8192
    num_warps: int = 4
    num_stages: int = 1
    tma: bool = False
    maxnreg: int | None = None


def test_neighbours_differ_in_one_field_and_stay_within_limits():
    found = set(tune.neighbours(Config()))
    assert found == {
        *(Config(BLOCK_M=32), Config(BLOCK_M=128)),
        *(Config(num_warps=2), Config(num_warps=8)),
        *(Config(num_stages=2), Config(tma=True), Config(maxnreg=128), Config(BLOCK_D=4096)),
    }
    assert Config(num_warps=64) not in set(tune.neighbours(Config(num_warps=32)))
    assert {config.maxnreg for config in tune.neighbours(Config(maxnreg=128))} == {None, 64, 128}


def test_search_combines_what_gains_and_stops():
    def seconds(configs):
        return [(1 if c.BLOCK_M == 256 else 2 + abs(c.BLOCK_M - 256) / 256) / (2 if c.tma else 1) for c in configs]

    best, gained = tune.search(Config(), seconds)
    assert best == Config(BLOCK_M=256, tma=True) and gained == pytest.approx(2.75 * 2)
    assert tune.search(Config(), lambda configs: [1.0] * len(configs)) == (Config(), 1.0)
    assert tune.search(Config(), lambda configs: [1.0, *[0.99] * (len(configs) - 1)]) == (Config(), 1.0)


def test_what_does_not_run_never_wins():
    default, *_ = tune.search(Config(), lambda configs: [1.0, *[float("inf")] * (len(configs) - 1)])
    assert default == Config()
    lost = tune.search(Config(), lambda configs: [float("inf")] * len(configs))  # a fault took the device along
    assert lost == (Config(), 1.0)


def fake_times(choices, place, configs):
    """As if wider loads paid, and one warp fewer than eight."""
    return [2.0 - (getattr(config, "num_warps", 0) == 8) - 0.5 * getattr(config, "tma", False) for config in configs]


@pytest.mark.skipif(triton.interpreting(), reason="descriptors of meta tensors are not the interpreter's")
@pytest.mark.parametrize("op", sorted(backends.table("triton")))
def test_every_choice_of_an_op_is_searched(op):
    """The first launches of its ahead-of-time case, without a device: what it asks of the tables, it is told of."""
    pytest.importorskip("triton")
    from bench import aot
    from uvg_engine.kernels import _launch

    def call():
        with _launch.recording(_launch.SM90) as launches:
            aot.cases(op)[0].call()
        seen.append([launch.options.get("num_warps") for launch in launches])

    seen = []
    lines = list(tune.winners(call, lambda choices, place, configs: (call(), fake_times(choices, place, configs))[1]))
    assert lines and all(": (SM90, " in line and "times faster than" in line for line in lines)
    assert any(line.startswith(f"{op}.") for line in lines), lines


def test_backwards_are_searched_in_the_thread_that_answers():
    """Autograd runs those of a CUDA device in a thread of its own unless it is told otherwise."""
    pytest.importorskip("triton")
    seen = []
    assert list(tune.winners(lambda: seen.append(torch.autograd.is_multithreading_enabled()), fake_times)) == []
    assert seen == [False] and torch.autograd.is_multithreading_enabled()


def test_winners_are_what_the_next_entries_are_searched_with():
    pytest.importorskip("triton")
    from uvg_engine.kernels._configs import Table
    from uvg_engine.kernels._launch import SM80, SM90

    first = Table("op.FIRST", {(SM80, 2, 64): Config()})
    second = Table("op.SECOND", {(SM80, 64): Config(num_warps=8)})
    got = []

    def call():
        got.append((first.choose(SM90, 2, 48), second.choose(SM90, 1)))

    def times(choices, place, configs):
        call()
        return fake_times(choices, place, configs)

    lines = list(tune.winners(call, times))
    assert lines[0].startswith("op.FIRST: (SM90, 2, 64): Config(") and "num_warps=8, num_stages=1, tma=True" in lines[0]
    assert lines[1].startswith("op.SECOND: (SM90, 64): Config(") and "4.00 times faster" in lines[0]
    assert got[0][0] == Config() and got[-1][0] == Config(num_warps=8, tma=True)
    assert first.choose(SM90, 2, 48) == Config(), "nothing stays set"
    with pytest.raises(ValueError, match=r"op.FIRST must have an entry for \(2, 65\)"):
        first.choose(SM90, 2, 65)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 1
    assert "sees no GPU here" in capsys.readouterr().out


def test_an_unknown_op_is_refused(capsys):
    with pytest.raises(SystemExit):
        tune.main(["softmax"])
    assert "no configuration of softmax is searched" in capsys.readouterr().err

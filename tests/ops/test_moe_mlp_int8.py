"""moe_mlp_int8: the shared suite, and what experts in bytes must keep."""

from __future__ import annotations

import pytest
import torch
from harness import BF16, FP32, Case, Mistake, OpSuite
from test_moe_mlp import experts, in_dtype, offsets

from uvg_engine import backends
from uvg_engine.ops import linear_int8, moe_mlp, moe_mlp_int8

FLOATS = ("x", "w1", "b1", "w2", "b2")


def case(name, *args):
    return Case(name, lambda g: experts(g, *args), constant=FLOATS)


class TestMoeMlpInt8(OpSuite):
    op = "moe_mlp_int8"
    cases = (
        case("two-modalities", (0, 5, 8), 6, 9),
        case("empty-experts", (0, 0, 7, 7, 9, 9), 13, 31),
        case("no-rows", (0, 0, 0), 8, 16),
        case("one-element", (0, 1), 1, 1),
        case("one-row", (0, 0, 1, 1), 17, 5),
        case("many-experts", tuple(range(0, 19, 2)) + (18, 18, 31), 7, 11),
        case("no-experts-no-rows", (0,), 4, 8),
        case("block-and-one", (0, 33, 98), 65, 129),
    )
    mistakes = (
        Mistake(r"x must be a floating-point \(T, D\)", {"x": lambda x: x[0]}),
        Mistake(r"w1 must be a floating-point \(E, F, D\)", {"w1": lambda w: w[0]}),
        Mistake(r"w1 must be \(2, 9, 6\) torch.float32", {"w1": lambda w: w[..., 1:]}),
        Mistake(r"b1 must be \(2, 9\) torch.float32", {"b1": lambda b: b.double()}),
        Mistake(r"w2 must be \(2, 6, 9\) torch.float32", {"w2": lambda w: w.mT}),
        Mistake(r"b2 must be \(2, 6\) torch.float32", {"b2": lambda b: b[0]}),
        Mistake(r"group_offsets must be \(3,\) torch.int32", {"group_offsets": lambda o: o.long()}),
        Mistake("group_offsets must ascend from 0 to T = 8", {"group_offsets": offsets(0, 9, 8)}),
        Mistake("moe_mlp_int8 has no gradient", {"w2": lambda w: w.requires_grad_()}),
        Mistake(
            "a row must have at most 65536 values",
            {"w1": torch.zeros(2, 65537, 6), "b1": torch.zeros(2, 65537), "w2": torch.zeros(2, 6, 65537)},
        ),
    )


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_is_linear_int8_twice(backend, dtype):
    made = in_dtype(experts(torch.Generator().manual_seed(0), (0, 5, 5, 12), 70, 90), dtype)
    for e, rows in ((0, slice(0, 5)), (2, slice(5, 12))):
        hidden = linear_int8(made["x"][rows], made["w1"][e], made["b1"][e], activation="gelu_tanh")
        assert torch.equal(moe_mlp_int8(**made)[rows], linear_int8(hidden, made["w2"][e], made["b2"][e]))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_error_of_normal_values(backend, dtype):
    """Four roundings to bytes, each as in linear_int8; values after GELU have half the range."""
    made = in_dtype(experts(torch.Generator().manual_seed(0), (0, 40, 60), 384, 1536), dtype)
    with backends.force("reference"):
        exact = moe_mlp(**{name: value.double() if name in FLOATS else value for name, value in made.items()})
    error = (moe_mlp_int8(**made).double() - exact).norm() / exact.norm()
    assert 0.004 < error < 0.015


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_row_is_what_it_is_alone(backend, dtype):
    """Bitwise, whatever stands beside it, however many rows its expert has and however many threads work."""
    made = in_dtype(experts(torch.Generator().manual_seed(0), (0, 200, 301), 128, 200), dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole = moe_mlp_int8(**made)
        torch.set_num_threads(1)
        for start, length in ((0, 1), (1, 7), (8, 192), (200, 8), (208, 93)):
            bounds = (0, length, length) if start < 200 else (0, 0, length)
            alone = made | {"x": made["x"][start : start + length], "group_offsets": offsets(*bounds)}
            assert torch.equal(moe_mlp_int8(**alone), whole[start : start + length])
    finally:
        torch.set_num_threads(threads)


def test_a_long_group_is_what_its_parts_are(monkeypatch):
    """The cpu kernel takes a long group in several turns, so that hidden rows stay in the cache."""
    from uvg_engine.backends.cpu import moe_mlp as kernel

    made = in_dtype(experts(torch.Generator().manual_seed(0), (0, 200, 301), 8, 16), FP32)
    want = moe_mlp_int8(**made)
    monkeypatch.setattr(kernel, "_FEWEST_ROWS", 7)
    monkeypatch.setattr(kernel, "_ROOM_BYTES", 0)
    assert torch.equal(moe_mlp_int8(**made), want)


def test_what_is_no_number_stays_in_its_row(backend):
    made = in_dtype(experts(torch.Generator().manual_seed(0), (0, 5, 12), 6, 9), FP32)
    want = moe_mlp_int8(**made)
    made["x"][3, 2] = torch.nan
    got = moe_mlp_int8(**made)
    assert got[3].isnan().all() and torch.equal(got[torch.arange(12) != 3], want[torch.arange(12) != 3])


def test_an_empty_expert_changes_nothing(backend):
    made = TestMoeMlpInt8.cases[0].inputs(FP32)
    weights = [torch.cat([made[n][:1], torch.full_like(made[n][:1], torch.nan), made[n][1:]]) for n in FLOATS[1:]]
    assert torch.equal(moe_mlp_int8(made["x"], *weights, offsets(0, 5, 5, 8)), moe_mlp_int8(**made))

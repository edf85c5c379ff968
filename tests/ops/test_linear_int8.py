"""linear_int8: the shared suite, how far the bytes are from the exact product, and what its rows must keep."""

from __future__ import annotations

import pytest
import torch
from harness import BF16, FP32, Case, Mistake, OpSuite
from test_linear import layer
from torch.nn import functional

from uvg_engine.ops import linear, linear_int8

WIDE = 4 * 768 + 5  # more depth than one block of sums takes


def case(name, *args, **more):
    return Case(name, lambda g: layer(g, *args, **more), constant=("x", "weight", "bias"))


class TestLinearInt8(OpSuite):
    op = "linear_int8"
    cases = (
        case("plain", 9, 6, 13),
        case("gelu", 8, 70, 9, activation="gelu_tanh"),
        case("no-bias", 5, 4, 3, bias=None),
        case("no-rows", 0, 8, 16),
        case("no-depth", 3, 0, 5),
        case("no-width", 3, 4, 0),
        case("one-element", 1, 1, 1),
        case("a-panel-and-one", 7, 33, 65),
        case("many-rows", 397, 17, 131),
        case("two-depth-blocks", 13, WIDE, 48),
    )
    mistakes = (
        Mistake(r"x must be a floating-point \(T, D\)", {"x": lambda x: x[0]}),
        Mistake(r"weight must be a floating-point \(F, D\)", {"weight": lambda w: w.int()}),
        Mistake(r"weight must be \(13, 6\) torch.float32", {"weight": lambda w: w[:, 1:]}),
        Mistake(r"bias must be \(13,\) torch.float32", {"bias": lambda b: b.double()}),
        Mistake("activation must be one of none, gelu_tanh", {"activation": "relu"}),
        Mistake("linear_int8 has no gradient", {"x": lambda x: x.requires_grad_()}),
        Mistake("a row must have at most 65536 values", {n: torch.zeros(13, 65537) for n in ("x", "weight")}),
    )


def made_in(dtype, *shape, seed=0):
    made = layer(torch.Generator().manual_seed(seed), *shape)
    return {name: value.to(dtype) for name, value in made.items()}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("rows, depth, width", [(64, 128, 96), (50, 1536, 200), (20, 8960, 64)])
def test_error_of_normal_values(backend, dtype, rows, depth, width):
    """Rounding to steps s errs by s / sqrt(12) at each value: 0.9 % of normal ones by 255 steps, 0.8 % by 127."""
    made = made_in(dtype, rows, depth, width)
    exact = functional.linear(*(value.double() for value in made.values()))
    error = (linear_int8(**made).double() - exact).norm() / exact.norm()
    assert 0.004 < error < 0.011


def test_whole_numbers_are_exact(backend):
    """Bytes as they are: every row reaches from 0 to 255, every row of the weight to 127; the sums are the largest."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (11, WIDE), generator=g).float()
    weight = torch.randint(-127, 128, (70, WIDE), generator=g).float()
    x[:, 0], x[:, 1], weight[:, 0] = 0, 255, 127
    x[3], weight[5] = 255, 127
    assert torch.equal(linear_int8(x, weight).double(), (x.double() @ weight.double().T).float().double())


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
def test_a_row_is_what_it_is_alone(backend, dtype, activation):
    """Bitwise, whatever stands beside it, NaN too, wherever it starts and however many threads work."""
    made = made_in(dtype, 211, WIDE, 70)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole = linear_int8(**made, activation=activation)
        torch.set_num_threads(1)
        for start, length in ((0, 1), (1, 7), (8, 92), (100, 111)):
            rows = made["x"][start : start + length]
            alone = linear_int8(**(made | {"x": rows}), activation=activation)
            assert torch.equal(alone, whole[start : start + length])
    finally:
        torch.set_num_threads(threads)
    made["x"][3] = torch.nan
    assert torch.equal(linear_int8(**made, activation=activation)[4:], whole[4:])


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["x", "weight"])
def test_what_is_no_number_is_seen(backend, odd, place):
    made = made_in(FP32, 5, 40, 20)
    want = linear_int8(**made)
    made[place][2, 33] = odd
    got, touched = linear_int8(**made), torch.zeros(5, 20, dtype=torch.bool)
    touched[(2,) if place == "x" else (slice(None), 2)] = True
    assert got[touched].isnan().all() and torch.equal(got[~touched], want[~touched])


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, 3e38])
def test_rows_of_one_value(backend, value):
    """A row without a range, one whose scale has no inverse, and the largest."""
    x, weight = torch.full((3, 40), value), torch.eye(40)
    torch.testing.assert_close(linear_int8(x, weight), x, rtol=1e-6, atol=1e-30)


def test_a_written_weight_is_read_again(backend):
    made = made_in(BF16, 3, 40, 70)
    del made["bias"]
    first = linear_int8(**made)
    made["weight"].mul_(2)
    assert torch.equal(linear_int8(**made), 2 * first)


def test_both_forms_of_a_weight_live_side_by_side(backend):
    made = made_in(FP32, 3, 40, 70)
    want = linear_int8(**made)
    linear(**made)
    assert torch.equal(linear_int8(**made), want)


def test_a_gradient_is_refused_only_while_gradients_are_on(backend):
    made = made_in(FP32, 3, 40, 70)
    want = linear_int8(**made)
    made["weight"].requires_grad_()
    with pytest.raises(ValueError, match=r"linear_int8 has no gradient.*\['weight'\]"):
        linear_int8(**made)
    with torch.no_grad():
        assert torch.equal(linear_int8(**made), want)

"""moe_combine: the shared suite, and its sum written out."""

from __future__ import annotations

import pytest
import torch
from harness import BF16, FP32, Case, DifferentiableOpSuite, Mistake, normal, run

from uvg_engine.ops import moe_combine


def case(name, rows, width, top_k, wide=("weights",)):
    def make(g):
        return {
            "rows": normal(g, rows * top_k, width),
            "order": torch.randperm(rows * top_k, generator=g).int(),
            "weights": normal(g, rows, top_k).softmax(-1),
        }

    return Case(name, make, wide)


class TestMoeCombine(DifferentiableOpSuite):
    op = "moe_combine"
    cases = (
        case("two", 11, 7, 2),
        case("one", 13, 4, 1),
        case("narrow-weights", 11, 7, 3, wide=()),
        case("one-row", 1, 33, 5),
        case("no-rows", 0, 8, 2),
        case("one-element", 1, 1, 1),
        case("block-and-one", 65, 129, 8),
    )
    mistakes = (
        Mistake(r"rows must be a floating-point \(T\*K, D\)", {"rows": lambda x: x[0]}),
        Mistake(r"rows must be \(22, 7\)", {"rows": lambda x: x[1:]}),
        Mistake(r"weights must be a floating-point \(T, K\)", {"weights": lambda w: w.int()}),
        Mistake("weights must have K > 0 columns", {"weights": lambda w: w[:, :0]}),
        Mistake(r"order must be \(22,\) torch.int32", {"order": lambda o: o.long()}),
        Mistake(r"order must be \(22,\) torch.int32", {"order": lambda o: o[1:]}),
        Mistake(r"order must lie in \[0, 22\)", {"order": lambda o: o + 1}),
        Mistake(r"order must lie in \[0, 22\)", {"order": lambda o: o - 1}),
        Mistake("order must name every slot once", {"order": lambda o: o.clamp(max=20)}),
    )


def test_equals_the_sum_written_out():
    made = TestMoeCombine.cases[0].inputs(torch.float64)
    want = torch.zeros(11, 7, dtype=torch.float64)
    for row, slot in zip(made["rows"], made["order"].tolist()):
        want[slot // 2] += made["weights"][slot // 2, slot % 2] * row
    torch.testing.assert_close(moe_combine(**made), want)


def test_the_order_of_the_grouped_rows_does_not_matter(backend):
    """Moving rows about together with their slots changes no bit, forward or backward."""
    case = TestMoeCombine.cases[0]
    made = case.inputs(FP32)
    out, grads, douts = run(moe_combine, case, made)
    moved = torch.randperm(22, generator=torch.Generator().manual_seed(0))
    turned = made | {n: made[n][moved] for n in ("rows", "order")}
    other, turned_grads, _ = run(moe_combine, case, turned, douts)
    assert torch.equal(out[0], other[0]) and torch.equal(grads["weights"], turned_grads["weights"])
    assert torch.equal(grads["rows"][moved], turned_grads["rows"])


def test_one_choice_of_weight_one_is_a_copy(backend):
    x = normal(torch.Generator().manual_seed(0), 9, 33).to(BF16)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1)).int()
    assert torch.equal(moe_combine(x, order, torch.ones(9, 1))[order.long()], x)


def test_linear_in_the_weights(backend):
    made = TestMoeCombine.cases[0].inputs(FP32)
    assert torch.equal(moe_combine(**(made | {"weights": 2 * made["weights"]})), 2 * moe_combine(**made))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_do_not_see_their_neighbours(backend, dtype):
    made = TestMoeCombine.cases[-1].inputs(dtype)
    whole = moe_combine(**made)
    place = torch.argsort(made["order"].long())
    for i in range(65):
        rows = made["rows"][place[8 * i : 8 * i + 8]]
        alone = moe_combine(rows, torch.arange(8, dtype=torch.int32), made["weights"][i : i + 1])
        assert torch.equal(alone[0], whole[i])

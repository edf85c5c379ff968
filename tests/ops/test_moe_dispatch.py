"""moe_dispatch: the shared suite, and the order in which rows stand."""

from __future__ import annotations

import torch
from harness import BF16, FP32, Case, DifferentiableOpSuite, Mistake, normal, run

from uvg_engine.ops import moe_combine, moe_dispatch


def case(name, rows, width, num_experts, top_k, used=None):
    def make(g):
        picked = torch.stack([torch.randperm(used or num_experts, generator=g)[:top_k] for _ in range(rows)] or [])
        return {"x": normal(g, rows, width), "experts": picked.int(), "num_experts": num_experts}

    def empty(g):
        return {
            "x": normal(g, 0, width),
            "experts": torch.zeros(0, top_k, dtype=torch.int32),
            "num_experts": num_experts,
        }

    return Case(name, make if rows else empty)


class TestMoeDispatch(DifferentiableOpSuite):
    op = "moe_dispatch"
    cases = (
        case("two-of-five", 11, 7, 5, 2),
        case("one-of-three", 13, 4, 3, 1),
        case("unused-experts", 5, 3, 9, 2, used=3),
        case("all", 5, 3, 4, 4),
        case("no-rows", 0, 8, 3, 2),
        case("many-experts", 7, 5, 300, 3),
        case("one-row", 1, 33, 5, 3),
        case("one-element", 1, 1, 1, 1),
        case("block-and-one", 65, 129, 8, 8),
    )
    mistakes = (
        Mistake(r"x must be a floating-point \(T, D\)", {"x": lambda x: x[0]}),
        Mistake(r"experts must be \(T, K\) with K > 0", {"experts": lambda e: e[:, :0]}),
        Mistake(r"experts must be \(11, 2\) torch.int32", {"experts": lambda e: e.long()}),
        Mistake(r"experts must be \(11, 2\) torch.int32", {"experts": lambda e: e[1:]}),
        Mistake("num_experts must be positive", {"num_experts": 0}),
        Mistake(r"experts must lie in \[0, 4\)", {"num_experts": 4, "experts": lambda e: e.clamp(max=4)}),
        Mistake(r"experts must lie in \[0, 5\)", {"experts": lambda e: e - 1}),
    )


def test_rows_stand_by_expert_then_row_then_choice(backend):
    x = torch.arange(4.0)[:, None]
    picked = torch.tensor([[2, 0], [0, 2], [2, 3], [0, 3]], dtype=torch.int32)
    rows, group_offsets, order = moe_dispatch(x, picked, 5)
    assert group_offsets.tolist() == [0, 3, 3, 6, 8, 8] and group_offsets.dtype == torch.int32
    assert order.tolist() == [1, 2, 6, 0, 3, 4, 5, 7] and order.dtype == torch.int32
    assert rows[:, 0].tolist() == [0, 1, 3, 0, 1, 2, 2, 3]


def test_slots_of_many_blocks_and_experts(backend):
    """More of both than a kernel holds counts of at a time."""
    g = torch.Generator().manual_seed(0)
    picked = torch.randint(0, 3, (150, 2), generator=g, dtype=torch.int32) * 2000
    rows, group_offsets, order = moe_dispatch(torch.arange(150.0)[:, None], picked, 4096)
    want = picked.flatten().argsort(stable=True)
    assert torch.equal(order.long(), want) and torch.equal(rows[:, 0].long(), want // 2)
    assert torch.equal(group_offsets.diff(), picked.flatten().long().bincount(minlength=4096).int())


def test_the_order_says_where_each_row_came_from(backend):
    made = TestMoeDispatch.cases[0].inputs(BF16)
    rows, group_offsets, order = moe_dispatch(**made)
    assert torch.equal(rows, made["x"][order.long() // 2])
    assert order.sort().values.tolist() == list(range(22))
    owner = torch.repeat_interleave(torch.arange(5), group_offsets.diff().long())
    assert torch.equal(made["experts"].flatten()[order.long()].long(), owner)


def test_the_gradient_of_a_row_is_the_sum_over_its_copies(backend):
    case = TestMoeDispatch.cases[0]
    made = case.inputs(FP32)
    (_, _, order), grads, (drows,) = run(moe_dispatch, case, made)
    want = torch.zeros(11, 7, dtype=torch.float64).index_add(0, order.long() // 2, drows.double())
    torch.testing.assert_close(grads["x"].double(), want, rtol=1e-6, atol=1e-6)


def test_both_choices_may_be_one_expert(backend):
    x = torch.arange(3.0)[:, None]
    rows, group_offsets, order = moe_dispatch(x, torch.tensor([[1, 1], [0, 1], [1, 1]], dtype=torch.int32), 2)
    assert rows[:, 0].tolist() == [1, 0, 0, 1, 2, 2] and order.tolist() == [2, 0, 1, 3, 4, 5]
    assert group_offsets.tolist() == [0, 1, 6]


def test_combine_undoes_it(backend):
    inputs = TestMoeDispatch.cases[0].inputs(FP32)
    rows, _, order = moe_dispatch(**inputs)
    torch.testing.assert_close(moe_combine(rows, order, torch.full((11, 2), 0.5)), inputs["x"])


def test_one_expert_with_everything_keeps_the_order(backend):
    x = normal(torch.Generator().manual_seed(0), 9, 3).float()
    rows, group_offsets, order = moe_dispatch(x, torch.ones(9, 1, dtype=torch.int32), 3)
    assert torch.equal(rows, x)
    assert group_offsets.tolist() == [0, 0, 9, 9] and order.tolist() == list(range(9))

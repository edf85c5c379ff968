"""moe_route: the shared suite, and the whole routed mixture against the dense one."""

from __future__ import annotations

import torch
from harness import BF16, FP64, Case, DifferentiableOpSuite, Mistake, normal
from test_moe_mlp import dense, experts

from uvg_engine.ops import moe_combine, moe_dispatch, moe_mlp, moe_route


def case(name, rows, num_experts, top_k):
    return Case(name, lambda g: {"logits": 2 * normal(g, rows, num_experts), "top_k": top_k})


class TestMoeRoute(DifferentiableOpSuite):
    op = "moe_route"
    cases = (
        case("two-of-five", 11, 5, 2),
        case("all", 7, 3, 3),
        case("one-of-one", 4, 1, 1),
        case("no-rows", 0, 5, 2),
        case("one-row", 1, 9, 4),
        case("many", 13, 67, 8),
        case("most", 3, 1031, 1030),
        Case("far-apart", lambda g: {"logits": 1e4 * normal(g, 7, 5), "top_k": 3}, smooth=False),
        Case("ties", lambda g: {"logits": torch.zeros(5, 4, dtype=FP64), "top_k": 2}, smooth=False),
    )
    mistakes = (
        Mistake(r"logits must be a floating-point \(T, E\)", {"logits": lambda x: x[0]}),
        Mistake(r"logits must be a floating-point \(T, E\)", {"logits": lambda x: x.int()}),
        Mistake(r"top_k must be in \[1, 5\]", {"top_k": 6}),
        Mistake(r"top_k must be in \[1, 5\]", {"top_k": 0}),
    )


def test_equals_softmax_topk_renormalised():
    logits = normal(torch.Generator().manual_seed(0), 9, 6)
    probability, chosen = logits.softmax(-1).topk(3)
    weights, picked = moe_route(logits, 3)
    assert torch.equal(picked, chosen.int())
    torch.testing.assert_close(weights, probability / probability.sum(-1, keepdim=True))


def test_weights_sum_to_one_and_descend(backend):
    weights, _ = moe_route(3 * normal(torch.Generator().manual_seed(0), 50, 12).float(), 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(50), rtol=1e-6, atol=0)
    assert bool((weights.diff(dim=-1) <= 0).all()) and bool((weights >= 0).all())


def test_a_common_shift_of_the_logits_changes_nothing(backend):
    logits = torch.randint(-64, 64, (20, 9), generator=torch.Generator().manual_seed(0)) / 8
    for a, b in zip(moe_route(logits, 4), moe_route(logits + 32, 4), strict=True):  # exact sums
        assert torch.equal(a, b)


def test_permuting_experts_permutes_the_choices(backend):
    g = torch.Generator().manual_seed(0)
    logits, order = normal(g, 20, 9).float(), torch.randperm(9, generator=g)
    weights, picked = moe_route(logits, 4)
    turned_weights, turned = moe_route(logits[:, order], 4)
    assert torch.equal(turned_weights, weights) and torch.equal(order[turned.long()].int(), picked)


def test_nan_comes_before_infinity(backend):
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[inf, nan, 0.0], [nan, inf, nan], [0.0, -inf, nan]])
    assert moe_route(logits, 2)[1].tolist() == [[1, 0], [0, 2], [2, 0]]


def test_experts_at_minus_infinity_come_last_with_weight_zero(backend):
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0]])
    weights, picked = moe_route(logits, 3)
    assert picked.tolist() == [[1, 3, 0]] and weights.tolist() == [[0.5, 0.5, 0.0]]


def test_ties_go_to_the_lower_index(backend):
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert moe_route(logits, 4)[1].tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


def test_rows_do_not_see_their_neighbours(backend):
    logits = normal(torch.Generator().manual_seed(0), 37, 11).to(BF16)
    weights, picked = moe_route(logits, 3)
    for i in range(37):
        weight, pick = moe_route(logits[i : i + 1], 3)
        assert torch.equal(weight[0], weights[i]) and torch.equal(pick[0], picked[i])


def mixture(logits, made, top_k):
    weights, picked = moe_route(logits, top_k)
    rows, group_offsets, order = moe_dispatch(made["x"], picked, logits.shape[1])
    return moe_combine(moe_mlp(rows, *(made[n] for n in ("w1", "b1", "w2", "b2")), group_offsets), order, weights)


def test_k_equal_to_e_is_the_dense_mixture():
    g = torch.Generator().manual_seed(0)
    made, logits = experts(g, (0, 0, 0, 7), 6, 9), normal(g, 7, 3)
    want = sum(logits.softmax(-1)[:, e : e + 1] * dense(made["x"], made, e) for e in range(3))
    torch.testing.assert_close(mixture(logits, made, 3), want)


def test_routed_mixture_by_numerical_gradient():
    g = torch.Generator().manual_seed(0)
    made, logits = experts(g, (0, 0, 0, 5), 3, 4), normal(g, 5, 3)
    names = ("x", "w1", "b1", "w2", "b2")
    leaves = [logits.requires_grad_(), *(made[n].requires_grad_() for n in names)]
    assert torch.autograd.gradcheck(lambda a, *b: mixture(a, dict(zip(names, b)), 2), leaves)

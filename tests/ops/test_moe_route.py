"""moe_route: the shared suite, and the whole routed mixture against the dense one."""

from __future__ import annotations

import torch
from harness import BF16, FP16, FP32, FP64, Case, Mistake, OpSuite, normal
from test_moe_mlp import dense, experts

from uvg_engine.ops import moe_combine, moe_dispatch, moe_mlp, moe_route


def case(name, rows, num_experts, top_k, dtypes=(FP32, BF16)):
    return Case(name, lambda g: {"logits": 2 * normal(g, rows, num_experts), "top_k": top_k}, dtypes=dtypes)


class TestMoeRoute(OpSuite):
    op = "moe_route"
    cases = (
        case("two-of-five", 11, 5, 2, dtypes=(FP32, BF16, FP16)),
        case("all", 7, 3, 3),
        case("one-of-one", 4, 1, 1),
        case("no-rows", 0, 5, 2),
        case("many", 13, 67, 8),
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


def test_ties_go_to_the_lower_index():
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert moe_route(logits, 4)[1].tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


def test_rows_do_not_see_their_neighbours():
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

"""Plans of calls that want a gradient: past the op's rules and on to torch, with the same results and gradients."""

import pytest
import torch
from test_plans import known, rows
from torch.utils.checkpoint import checkpoint

from uvg_engine import ops
from uvg_engine.backends import native
from uvg_engine.ops import _plans, _registry

pytestmark = pytest.mark.skipif(not _plans._begin(), reason="no native core, or a torch without DLPack's functions")


def leaf(seed, *shape):
    return rows(seed, *shape).requires_grad_()


@pytest.fixture
def no_rules(monkeypatch):
    """A function after which a call that the op's own Python serves fails."""

    def forbid():
        monkeypatch.setattr(_registry, "alone", lambda args: pytest.fail("the long way"))

    for planner in _plans.planners.values():
        native.core().plans_forget(planner)
    monkeypatch.delenv("UVG_BACKENDS", raising=False)
    return forbid


def test_who_wants_a_gradient_belongs_to_a_call(no_rules):
    x, weight, bias = rows(0), rows(1, 7, 8), rows(2, 1, 7)[0]
    dx, dweight, dbias = torch.ones(5, 7) @ weight, torch.ones(7, 5) @ x, torch.full((7,), 5.0)
    for _ in range(3):
        for wanting in ([0], [1], [2], [0, 1], [0, 1, 2]):
            given = [value.clone().requires_grad_(i in wanting) for i, value in enumerate((x, weight, bias))]
            ops.linear(*given).sum().backward()
            for i, (value, want) in enumerate(zip(given, (dx, dweight, dbias), strict=True)):
                assert (value.grad is not None) == (i in wanting)
                if i in wanting:
                    torch.testing.assert_close(value.grad, want)


def test_experts_of_the_embedded_models_size_have_plans(long_ways):
    x, w1, w2 = leaf(0, 92, 128), leaf(1, 2, 512, 128), leaf(2, 2, 128, 512)
    b1, b2, dy = leaf(3, 2, 512), leaf(4, 2, 128), rows(5, 92, 128)
    offsets = torch.tensor([0, 64, 92], dtype=torch.int32)

    def gradients():
        return torch.autograd.grad(ops.moe_mlp(x, w1, b1, w2, b2, offsets), (x, w1, b1, w2, b2), dy)

    want = gradients()
    known(gradients)
    long_ways.clear()
    assert all(torch.equal(*pair) for pair in zip(gradients(), want, strict=True)) and not long_ways


def test_the_same_tensor_twice_is_no_other_tensor(no_rules):
    h, y = leaf(0), leaf(1)
    known(ops.gated_residual, h, h)
    known(ops.gated_residual, h, y)
    assert torch.equal(ops.gated_residual(h, y), h + y) and torch.equal(ops.gated_residual(y, y), 2 * y)
    (twice,) = torch.autograd.grad(ops.gated_residual(y, y).sum(), y)
    assert torch.equal(twice, torch.full_like(y, 2))


def test_rules_hold(no_rules):
    x, weight = rows(0), leaf(1, 7, 8)
    spans = torch.tensor([[0, 2], [2, 3]], dtype=torch.int32)
    known(lambda: ops.linear(x, weight, row_spans=spans))
    with pytest.raises(ValueError, match=r"weight must be \(7, 9\)"):
        ops.linear(rows(2, 5, 9), weight, row_spans=spans)
    spans[1, 1] = 4
    with pytest.raises(ValueError, match="row_spans must tile"):
        ops.linear(x, weight, row_spans=spans)
    spans[1, 1] = 3
    no_rules()
    torch.testing.assert_close(ops.linear(x, weight, row_spans=spans), x @ weight.T)


def test_an_error_of_the_call_is_told_once(no_rules, monkeypatch):
    """Of what torch is given, not of a second try."""
    seen, x, weight = [], rows(0), leaf(1, 7, 8)
    known(ops.linear, x, weight)

    def hook(value):
        seen.append(value)
        raise KeyboardInterrupt

    with torch.autograd.graph.saved_tensors_hooks(hook, lambda value: value), pytest.raises(KeyboardInterrupt):
        ops.linear(x, weight)
    assert len(seen) == 1


def test_a_gradient_is_what_it_was_without_plans(no_rules):
    x, weight = leaf(0), leaf(1, 7, 8)
    known(ops.linear, x, weight)
    twice = torch.autograd.grad(ops.linear(x, weight).sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(twice.sum(), weight)
    checkpoint(ops.linear, x, weight, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(5, 7) @ weight)
    with torch.autograd.detect_anomaly(check_nan=True):
        ops.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.ones(5, 7) @ weight)


def test_gelu_and_its_backward_are_by_plans(long_ways):
    x, weight, dy = leaf(0), leaf(1, 7, 8), rows(2, 5, 7)
    for _ in range(4):
        del long_ways[:]
        (dx,) = torch.autograd.grad(ops.linear(x, weight, activation="gelu_tanh"), x, dy)
    want = torch.autograd.grad(torch.nn.functional.gelu(x @ weight.T, approximate="tanh"), x, dy)[0]
    torch.testing.assert_close(dx, want)
    assert not long_ways


def test_the_backward_of_a_sum_is_by_a_plan(long_ways):
    """Its gradient is one number, expanded."""
    x, weight = leaf(0), leaf(1, 7, 8)
    for _ in range(4):
        del long_ways[:]
        dx = torch.autograd.grad(ops.linear(x, weight).sum(), x)[0]
    torch.testing.assert_close(dx, torch.ones(5, 7) @ weight.detach())
    assert not long_ways


def test_a_call_of_two_ops_has_no_plan(no_rules, monkeypatch, caplog):
    monkeypatch.setattr(_plans, "_told", set())
    caplog.set_level("DEBUG", logger="uvg_engine.ops._plans")
    h, y, tables = leaf(0), leaf(1), [torch.tensor([[0, 5]], dtype=torch.int32) for _ in range(2)]
    gate, shift, scale = leaf(2, 1, 8), rows(3, 1, 8), rows(4, 1, 8)
    out, _ = known(lambda: ops.gated_residual_norm(h, y, gate, tables[0], shift, scale, tables[1]))
    torch.testing.assert_close(out, h + gate * y)
    known(ops.gated_residual_norm, h, y, gate, tables[0], shift, scale, tables[1])
    assert "no plan of a call of gated_residual_norm: it does more than one op" in caplog.messages
    assert native.core().plans_of(_plans.planners[ops.gated_residual_norm]) == 0
    assert native.core().plans_of(_plans.planners[ops.gated_residual]) == 1

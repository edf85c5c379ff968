"""gated_residual: the shared suite, and what must hold without a reference."""

from __future__ import annotations

import pytest
import torch
from harness import BF16, FP16, FP32, Case, DifferentiableOpSuite, Mistake, normal, run, spans

from uvg_engine.ops import gated_residual


def gated(g, lengths, width):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return {
        "h": normal(g, sum(lengths), width),
        "y": normal(g, sum(lengths), width),
        "gate": normal(g, len(lengths), width),
        "spans": spans(*zip(starts, lengths, strict=True)),
    }


class TestGatedResidual(DifferentiableOpSuite):
    op = "gated_residual"
    cases = (
        Case("empty-span", lambda g: gated(g, (3, 0, 7, 1), 13), ("gate",)),
        Case("wide-stream", lambda g: gated(g, (4, 5), 16), ("h", "gate"), dtypes=(BF16, FP16)),
        Case("no-gate", lambda g: {"h": normal(g, 5, 8), "y": normal(g, 5, 8)}),
        Case("no-rows", lambda g: gated(g, (0,), 8), ("gate",)),
        Case("no-spans", lambda g: gated(g, (), 8), ("gate",)),
        Case("one-element", lambda g: gated(g, (1,), 1), ("gate",)),
        Case("many-spans", lambda g: gated(g, [(5 * i) % 7 for i in range(40)], 9), ("gate",)),
        Case("narrow-gate", lambda g: gated(g, (2, 5), 15)),
        Case("one-row", lambda g: gated(g, (1,), 33), ("gate",)),
        Case("block-and-one", lambda g: gated(g, (31, 33, 1), 1025), ("gate",)),
    )
    mistakes = (
        Mistake(r"h must be a floating-point \(T, D\)", {"h": lambda h: h[0]}),
        Mistake(r"y must be a floating-point \(T, D\)", {"y": lambda y: y.int()}),
        Mistake(r"y must be \(11, 13\)", {"y": lambda y: y[1:]}),
        Mistake("gate and spans must be given together", {"gate": None}),
        Mistake("gate and spans must be given together", {"spans": None}),
        Mistake(r"gate must be \(4, 13\)", {"gate": lambda x: x[:1]}),
        Mistake(r"spans must be an int32 \(S, 2\)", {"spans": lambda s: s.flatten()}),
        Mistake(r"spans must lie in \[0, 11\)", {"spans": lambda s: s + torch.tensor([1, 0], dtype=torch.int32)}),
        Mistake(r"spans must lie in \[0, 11\)", {"spans": lambda s: s - torch.tensor([1, 0], dtype=torch.int32)}),
        Mistake(r"spans must lie in \[0, 11\)", {"spans": lambda s: -s}),
        Mistake("spans must not overlap", {"spans": spans((0, 3), (3, 0), (2, 7), (10, 1))}),
    )


def test_equals_its_formula():
    made = gated(torch.Generator().manual_seed(0), (4, 2, 5), 9)
    owner = torch.tensor([0] * 4 + [1] * 2 + [2] * 5)
    torch.testing.assert_close(gated_residual(**made), made["h"] + made["gate"][owner] * made["y"])


def test_rows_outside_the_spans_keep_the_stream(backend):
    g = torch.Generator().manual_seed(0)
    h, y, gate = normal(g, 6, 4).float(), normal(g, 6, 4).float().requires_grad_(), normal(g, 1, 4).float()
    out = gated_residual(h, y, gate, spans((2, 2)))
    assert torch.equal(out[[0, 1, 4, 5]], h[[0, 1, 4, 5]])
    assert not torch.autograd.grad(out.sum(), y)[0][[0, 1, 4, 5]].any()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_do_not_see_their_neighbours(backend, dtype):
    made = gated(torch.Generator().manual_seed(0), (1,) * 37, 33)
    made = {n: v.to(dtype) if v.is_floating_point() else v for n, v in made.items()}
    whole = gated_residual(**made)
    for i in range(37):
        alone = {n: made[n][i : i + 1] for n in ("h", "y", "gate")}
        assert torch.equal(gated_residual(**alone, spans=spans((0, 1))), whole[i : i + 1])


def test_spans_may_come_in_any_order(backend):
    case = TestGatedResidual.cases[0]
    made = case.inputs(FP32)
    out, grads, douts = run(gated_residual, case, made)
    turned = made | {n: made[n].flip(0) for n in ("gate", "spans")}
    other, turned_grads, _ = run(gated_residual, case, turned, douts)
    assert torch.equal(out[0], other[0]) and torch.equal(grads["gate"], turned_grads["gate"].flip(0))


def test_an_open_gate_is_no_gate(backend):
    made = gated(torch.Generator().manual_seed(0), (4, 2, 5), 33)
    h, y = made["h"].to(BF16), made["y"].to(BF16)
    assert torch.equal(gated_residual(h, y, torch.ones(3, 33), made["spans"]), gated_residual(h, y))


def test_the_stream_gets_its_gradient_as_it_is(backend):
    made = TestGatedResidual.cases[0].inputs(FP32)
    made["h"].requires_grad_()
    dout = torch.arange(made["h"].numel()).reshape(made["h"].shape).float()
    assert torch.equal(torch.autograd.grad(gated_residual(**made), made["h"], dout)[0], dout)


def test_a_plain_sum_keeps_nothing_for_its_backward():
    h, y = torch.ones(3, 5, requires_grad=True), torch.ones(3, 5, dtype=BF16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        out = gated_residual(h, y)
    dout = torch.rand(3, 5)
    dh, dy = torch.autograd.grad(out, (h, y), dout)
    assert not kept and torch.equal(dh, dout) and torch.equal(dy, dout.to(BF16))


def test_a_closed_gate_keeps_the_stream(backend):
    case = TestGatedResidual.cases[0]
    made = case.inputs(BF16)
    assert torch.equal(gated_residual(**(made | {"gate": torch.zeros(4, 13)})), made["h"])


def test_spans_past_those_looked_at_together(backend):
    """Kernels look at up to 256 spans at a time: the last ones count like the first."""
    case, lengths = TestGatedResidual.cases[0], (1, 2, *(0,) * 256, 3, 1)
    g = torch.Generator().manual_seed(0)
    made = {"h": normal(g, 7, 9).float(), "y": normal(g, 7, 9).float(), "gate": normal(g, 4, 9).float()}
    used, starts = [0, 1, 258, 259], [sum(lengths[:i]) for i in range(len(lengths))]
    few = spans(*((starts[i], lengths[i]) for i in used))
    gate = torch.zeros(len(lengths), 9)
    gate[used] = made["gate"]
    out, grads, douts = run(gated_residual, case, made | {"spans": few})
    many, more, _ = run(gated_residual, case, made | {"spans": spans(*zip(starts, lengths)), "gate": gate}, douts)
    assert torch.equal(out[0], many[0]) and torch.equal(grads["y"], more["y"])
    assert torch.equal(grads["gate"], more["gate"][used]) and not more["gate"][2:258].any()

"""gated_residual, and gated_residual_norm as its composition with the norm."""

from __future__ import annotations

import torch
from harness import BF16, FP16, FP32, Case, Mistake, OpSuite, normal, spans

from uvg_engine.ops import gated_residual, gated_residual_norm, modulated_layer_norm


def gated(g, lengths, width):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return {
        "h": normal(g, sum(lengths), width),
        "y": normal(g, sum(lengths), width),
        "gate": normal(g, len(lengths), width),
        "spans": spans(*zip(starts, lengths, strict=True)),
    }


class TestGatedResidual(OpSuite):
    op = "gated_residual"
    cases = (
        Case("empty-span", lambda g: gated(g, (3, 0, 7, 1), 13), ("gate",), dtypes=(FP32, BF16, FP16)),
        Case("wide-stream", lambda g: gated(g, (4, 5), 16), ("h", "gate"), dtypes=(BF16, FP16)),
        Case("no-gate", lambda g: {"h": normal(g, 5, 8), "y": normal(g, 5, 8)}),
        Case("no-rows", lambda g: gated(g, (0,), 8), ("gate",)),
        Case("no-spans", lambda g: gated(g, (), 8), ("gate",)),
        Case("one-element", lambda g: gated(g, (1,), 1), ("gate",)),
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
    )


def test_equals_its_formula():
    made = gated(torch.Generator().manual_seed(0), (4, 2, 5), 9)
    owner = torch.tensor([0] * 4 + [1] * 2 + [2] * 5)
    torch.testing.assert_close(gated_residual(**made), made["h"] + made["gate"][owner] * made["y"])


def test_rows_outside_the_spans_keep_the_stream():
    g = torch.Generator().manual_seed(0)
    h, y, gate = normal(g, 6, 4), normal(g, 6, 4), normal(g, 1, 4)
    out = gated_residual(h, y, gate, spans((2, 2)))
    assert torch.equal(out[[0, 1, 4, 5]], h[[0, 1, 4, 5]])


def test_a_closed_gate_keeps_the_stream():
    case = TestGatedResidual.cases[0]
    made = case.inputs(BF16)
    assert torch.equal(gated_residual(**(made | {"gate": torch.zeros(4, 13)})), made["h"])


def test_gated_residual_norm_is_the_two_ops():
    g = torch.Generator().manual_seed(0)
    made = gated(g, (4, 2, 5), 12)
    shift, scale, weight = normal(g, 3, 12), normal(g, 3, 12), normal(g, 12)
    out, normed = gated_residual_norm(**made, shift=shift, scale=scale, norm_spans=made["spans"], weight=weight)
    want = gated_residual(**made)
    assert torch.equal(out, want)
    assert torch.equal(normed, modulated_layer_norm(want, shift, scale, made["spans"], weight=weight))
    assert gated_residual_norm(made["h"], made["y"], norm_dtype=BF16)[1].dtype == BF16

"""modulated_layer_norm: the shared suite, and what must hold without a reference."""

from __future__ import annotations

import pytest
import torch
from harness import BF16, FP16, FP32, FP64, Case, Mistake, OpSuite, normal, spans
from torch.nn import functional

from uvg_engine.ops import modulated_layer_norm


def modulated(g, lengths, width, offset=0.0):
    """One (shift, scale) per span of the given lengths, spans one after another."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return {
        "x": normal(g, sum(lengths), width) + offset,
        "shift": normal(g, len(lengths), width),
        "scale": normal(g, len(lengths), width),
        "spans": spans(*zip(starts, lengths, strict=True)),
    }


def affine(g, width):
    return {"weight": normal(g, width), "bias": normal(g, width)}


MOD = ("shift", "scale")
ALL = (*MOD, "weight", "bias")


class TestModulatedLayerNorm(OpSuite):
    op = "modulated_layer_norm"
    cases = (
        Case("empty-span", lambda g: modulated(g, (3, 0, 7, 1), 17), MOD, dtypes=(FP32, BF16, FP16)),
        Case("everything", lambda g: modulated(g, (2, 3), 16) | affine(g, 16), ALL),
        Case("plain", lambda g: {"x": normal(g, 5, 8)}),
        Case("affine", lambda g: {"x": normal(g, 5, 13)} | affine(g, 13)),
        Case("weight-only", lambda g: {"x": normal(g, 3, 11), "weight": normal(g, 11), "eps": 1e-5}),
        Case("no-rows", lambda g: modulated(g, (0, 0), 8) | affine(g, 8), MOD),
        Case("one-element", lambda g: modulated(g, (1,), 1), MOD),
        Case("block-and-one", lambda g: modulated(g, (31, 33, 1), 1025), MOD),
        Case("far-from-zero", lambda g: modulated(g, (4, 5), 64, offset=1000.0), MOD, dtypes=(FP32,), ulps=1024),
    )
    mistakes = (
        Mistake(r"x must be a floating-point \(T, D\)", {"x": lambda x: x[0]}),
        Mistake(r"x must be a floating-point \(T, D\)", {"x": lambda x: x.int()}),
        Mistake("shift, scale and spans must be given together", {"scale": None}),
        Mistake(r"shift must be \(4, 17\)", {"shift": lambda s: s[1:]}),
        Mistake(r"scale must be \(4, 17\)", {"scale": lambda s: s[:, 1:]}),
        Mistake(r"spans must be an int32 \(S, 2\)", {"spans": lambda s: s.long()}),
        Mistake(r"spans must be an int32 \(S, 2\)", {"spans": lambda s: s[:, :1]}),
        Mistake(r"weight must be \(17,\)", {"weight": torch.ones(16)}),
        Mistake(r"bias must be \(17,\)", {"bias": torch.ones(1, 17)}),
    )


def test_equals_layer_norm_of_torch():
    g = torch.Generator().manual_seed(0)
    x, weight, bias = normal(g, 9, 12), normal(g, 12), normal(g, 12)
    torch.testing.assert_close(
        modulated_layer_norm(x, weight=weight, bias=bias), functional.layer_norm(x, (12,), weight, bias, 1e-6)
    )
    shift, scale = normal(g, 2, 12), normal(g, 2, 12)
    got = modulated_layer_norm(x, shift, scale, spans((0, 4), (4, 5)))
    owner = torch.tensor([0] * 4 + [1] * 5)
    torch.testing.assert_close(got, functional.layer_norm(x, (12,), eps=1e-6) * (1 + scale[owner]) + shift[owner])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_do_not_see_their_neighbours(dtype):
    x = normal(torch.Generator().manual_seed(0), 37, 33).to(dtype)
    whole = modulated_layer_norm(x)
    assert all(torch.equal(modulated_layer_norm(x[i : i + 1])[0], whole[i]) for i in range(37))


def test_modulation_of_zero_changes_nothing():
    x = normal(torch.Generator().manual_seed(0), 6, 10).to(FP32)
    zero = torch.zeros(2, 10)
    assert torch.equal(modulated_layer_norm(x, zero, zero, spans((0, 5), (5, 1))), modulated_layer_norm(x))


def test_spans_may_come_in_any_order():
    case = TestModulatedLayerNorm.cases[0]
    made = case.inputs(FP64)
    turned = made | {name: made[name].flip(0) for name in ("shift", "scale", "spans")}
    assert torch.equal(modulated_layer_norm(**made), modulated_layer_norm(**turned))

"""modulated_layer_norm: the shared suite, and what must hold without a reference."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from harness import BF16, FP32, Case, DifferentiableOpSuite, Mistake, normal, run, spans
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


class TestModulatedLayerNorm(DifferentiableOpSuite):
    op = "modulated_layer_norm"
    cases = (
        Case("empty-span", lambda g: modulated(g, (3, 0, 7, 1), 17), MOD),
        Case("everything", lambda g: modulated(g, (2, 3), 16) | affine(g, 16), ALL),
        Case("plain", lambda g: {"x": normal(g, 5, 8)}),
        Case("affine", lambda g: {"x": normal(g, 5, 13)} | affine(g, 13)),
        Case("weight-only", lambda g: {"x": normal(g, 3, 11), "weight": normal(g, 11), "eps": 1e-5}),
        Case("no-rows", lambda g: modulated(g, (0, 0), 8) | affine(g, 8), MOD),
        Case("one-element", lambda g: modulated(g, (1,), 1), MOD),
        Case("many-spans", lambda g: modulated(g, [(5 * i) % 7 for i in range(40)], 9) | affine(g, 9), ALL),
        Case("narrow-parameters", lambda g: modulated(g, (2, 5), 15) | affine(g, 15)),
        Case("one-row", lambda g: modulated(g, (1,), 33), MOD),
        Case("block-and-one", lambda g: modulated(g, (31, 33, 1), 1025), MOD),
        Case("in-parts", lambda g: modulated(g, (4, 0, 5), 2051) | affine(g, 2051), ALL, dtypes=(FP32,)),
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
        Mistake(r"spans must lie in \[0, 11\)", {"spans": lambda s: s + torch.tensor([1, 0], dtype=torch.int32)}),
        Mistake(r"spans must lie in \[0, 11\)", {"spans": lambda s: s - torch.tensor([1, 0], dtype=torch.int32)}),
        Mistake(r"spans must lie in \[0, 11\)", {"spans": lambda s: -s}),
        Mistake("spans must not overlap", {"spans": spans((0, 3), (3, 0), (2, 7), (10, 1))}),
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
def test_rows_do_not_see_their_neighbours(backend, dtype):
    x = normal(torch.Generator().manual_seed(0), 37, 33).to(dtype)
    whole = modulated_layer_norm(x)
    assert all(torch.equal(modulated_layer_norm(x[i : i + 1])[0], whole[i]) for i in range(37))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_samples_do_not_see_their_neighbours(backend, dtype):
    case = TestModulatedLayerNorm.cases[0]
    made, starts = case.inputs(dtype), (0, 3, 3, 10, 11)
    whole = modulated_layer_norm(**made)
    for i, (first, last) in enumerate(pairwise(starts)):
        mine = {name: made[name][i : i + 1] for name in MOD} | {"spans": spans((0, last - first))}
        assert torch.equal(modulated_layer_norm(made["x"][first:last], **mine), whole[first:last])


def test_a_row_of_nan_spoils_no_other(backend):
    x = normal(torch.Generator().manual_seed(0), 9, 33).to(FP32)
    whole = modulated_layer_norm(x)
    x[4] = torch.nan
    spoilt = modulated_layer_norm(x)
    assert spoilt[4].isnan().all() and torch.equal(spoilt[[0, 1, 2, 3, 5, 6, 7, 8]], whole[[0, 1, 2, 3, 5, 6, 7, 8]])


def test_scale_and_offset_of_a_row_do_not_matter(backend):
    x = normal(torch.Generator().manual_seed(0), 9, 65).to(FP32)
    want = modulated_layer_norm(x)
    torch.testing.assert_close(modulated_layer_norm(1024 * x), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(modulated_layer_norm(x + 5), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(want.mean(-1), torch.zeros(9), rtol=0, atol=1e-6)
    torch.testing.assert_close(want.square().mean(-1), torch.ones(9), rtol=1e-5, atol=0)


def test_equal_elements_give_the_shift(backend):
    """A variance of zero: eps keeps the row finite, forward and backward."""
    g = torch.Generator().manual_seed(0)
    x = torch.full((3, 16), 7.0, requires_grad=True)
    shift, scale = normal(g, 1, 16).float(), normal(g, 1, 16).float()
    out = modulated_layer_norm(x, shift, scale, spans((0, 3)))
    assert torch.equal(out, shift.expand(3, 16))
    assert torch.autograd.grad(out.square().sum(), x)[0].isfinite().all()


def test_modulation_of_zero_changes_nothing(backend):
    x = normal(torch.Generator().manual_seed(0), 6, 10).to(FP32)
    zero = torch.zeros(2, 10)
    assert torch.equal(modulated_layer_norm(x, zero, zero, spans((0, 5), (5, 1))), modulated_layer_norm(x))


def test_spans_may_come_in_any_order(backend):
    case = TestModulatedLayerNorm.cases[0]
    made = case.inputs(FP32)
    turned = made | {name: made[name].flip(0) for name in ("shift", "scale", "spans")}
    out, grads, douts = run(modulated_layer_norm, case, made)
    other, turned_grads, _ = run(modulated_layer_norm, case, turned, douts)
    assert torch.equal(out[0], other[0]) and torch.equal(grads["x"], turned_grads["x"])
    assert all(torch.equal(grads[name], turned_grads[name].flip(0)) for name in MOD)

"""gated_residual_norm: the shared suite, and that it is the two ops it is made of."""

from __future__ import annotations

import pytest
import torch
from harness import BF16, FP16, FP32, Case, DifferentiableOpSuite, Mistake, normal, run, spans

from uvg_engine.ops import gated_residual, gated_residual_norm, modulated_layer_norm

PARAMETERS = ("gate", "shift", "scale", "weight", "bias")


def fused(g, lengths, width, parts=PARAMETERS, **more):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows, table = sum(lengths), spans(*zip(starts, lengths, strict=True))
    made = {"h": normal(g, rows, width), "y": normal(g, rows, width)}
    made |= {name: normal(g, *((width,) if name in ("weight", "bias") else (len(lengths), width))) for name in parts}
    made |= {name: table for name, part in (("spans", "gate"), ("norm_spans", "shift")) if part in parts}
    return made | more


def case(name, *args, wide=PARAMETERS, dtypes=(FP32, BF16, FP16), **kwargs):
    # The norm reads the stream as it is stored: in bf16 the fp32 gradients of the parameters have bf16's error.
    smooth = kwargs.get("norm_dtype") is None
    return Case(name, lambda g: fused(g, *args, **kwargs), wide, dtypes=dtypes, smooth=smooth, ulps=2**17)


class TestGatedResidualNorm(DifferentiableOpSuite):
    op = "gated_residual_norm"
    cases = (
        case("empty-span", (3, 0, 7, 1), 13),
        case("gate-and-affine", (4, 2, 5), 16, ("gate", "weight", "bias")),
        case("no-gate-modulated", (4, 2, 5), 17, ("shift", "scale")),
        case("nothing", (5,), 8, ()),
        case("weight-only", (5, 2), 11, ("weight",), eps=1e-5),
        case("no-rows", (0, 0), 8),
        case("no-spans", (), 8),
        case("one-element", (1,), 1),
        case("many-spans", [(5 * i) % 7 for i in range(40)], 9),
        case("narrow-parameters", (2, 5), 15, wide=()),
        case("block-and-one", (31, 33, 70), 1025),
        case("wide-stream", (4, 5), 64, wide=("h", *PARAMETERS), dtypes=(BF16, FP16)),
        case("narrow-norm", (4, 70), 48, wide=("h", *PARAMETERS), dtypes=(BF16,), norm_dtype=BF16),
        case("half-norm", (4, 70), 48, wide=("h", *PARAMETERS), dtypes=(FP16,), norm_dtype=FP16),
        case("wide-norm", (4, 5), 48, dtypes=(BF16, FP16), norm_dtype=FP32),
    )
    mistakes = (
        Mistake(r"h must be a floating-point \(T, D\)", {"h": lambda h: h[0]}),
        Mistake(r"y must be \(11, 13\)", {"y": lambda y: y[1:]}),
        Mistake("gate and spans must be given together", {"gate": None}),
        Mistake("shift, scale and spans must be given together", {"scale": None}),
        Mistake(r"gate must be \(4, 13\)", {"gate": lambda x: x[:1]}),
        Mistake(r"shift must be \(4, 13\)", {"shift": lambda x: x[:1]}),
        Mistake(r"weight must be \(13,\)", {"weight": torch.ones(12)}),
        Mistake(r"bias must be \(13,\)", {"bias": torch.ones(12)}),
        Mistake(r"spans must be an int32 \(S, 2\)", {"norm_spans": lambda s: s.long()}),
        Mistake("norm_dtype must be a floating-point dtype", {"norm_dtype": torch.int32}),
        Mistake("norm_dtype must be a floating-point dtype", {"norm_dtype": "float32"}),
        Mistake(
            r"spans must lie in \[0, 11\)", {n: spans((1, 11), (0, 0), (0, 0), (0, 0)) for n in ("spans", "norm_spans")}
        ),
        Mistake(
            "spans must not overlap",
            dict.fromkeys(("spans", "norm_spans"), spans((0, 3), (3, 0), (2, 7), (10, 1))),
        ),
    )


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("width", [12, 192])
def test_is_the_two_ops(backend, dtype, width):
    made = fused(torch.Generator().manual_seed(0), (4, 2, 75), width)
    made = {n: v.to(dtype if n in "hy" else FP32) if v.is_floating_point() else v for n, v in made.items()}
    out, normed = gated_residual_norm(**made)
    first = {n: made[n] for n in ("h", "y", "gate", "spans")}
    want = gated_residual(**first)
    rest = {n: made[n] for n in ("shift", "scale", "weight", "bias")}
    want_normed = modulated_layer_norm(want, spans=made["norm_spans"], **rest)
    assert torch.equal(out, want)
    torch.testing.assert_close(normed, want_normed)


def test_the_norm_is_rounded_once(backend):
    made = TestGatedResidualNorm.cases[0].inputs(FP32)
    out, normed = gated_residual_norm(**made, norm_dtype=BF16)
    wide = gated_residual_norm(**made)[1]
    assert out.dtype == wide.dtype == FP32 and torch.equal(normed, wide.to(BF16))


def test_a_wider_norm_is_rounded_once_of_two_tables_too(backend):
    made = TestGatedResidualNorm.cases[0].inputs(BF16)
    out, normed = gated_residual_norm(**made, norm_dtype=FP32)
    equal = made | {"norm_spans": made["norm_spans"].clone()}
    again, normed_again = gated_residual_norm(**equal, norm_dtype=FP32)
    assert made["spans"] is made["norm_spans"] and torch.equal(again, out)
    torch.testing.assert_close(normed_again, normed, rtol=1e-5, atol=1e-5)


def test_two_tables_are_two_ops(backend):
    """Gates of three samples, modulations of one: no single table says both."""
    case = TestGatedResidualNorm.cases[0]
    made = case.inputs(FP32)
    other = made | {"norm_spans": spans((0, 11)), "shift": made["shift"][:1], "scale": made["scale"][:1]}
    out, grads, douts = run(gated_residual_norm, case, other)
    spread = made | {n: other[n].expand(4, -1) for n in ("shift", "scale")}
    want, want_grads, _ = run(gated_residual_norm, case, spread, douts)
    for got, wanted in zip(out, want, strict=True):
        torch.testing.assert_close(got, wanted)
    for name in ("h", "y", "gate", "weight", "bias"):
        torch.testing.assert_close(grads[name], want_grads[name])


@pytest.mark.parametrize("unused", [0, 1])
def test_one_result_may_go_unused(backend, unused):
    made = TestGatedResidualNorm.cases[0].inputs(FP32)
    h = made["h"].requires_grad_()
    results = gated_residual_norm(**made)
    grad = torch.autograd.grad(results[1 - unused].square().sum(), h)[0]
    out = gated_residual(h, made["y"], made["gate"], made["spans"])
    rest = {n: made[n] for n in ("shift", "scale", "weight", "bias")}
    apart = out, modulated_layer_norm(out, spans=made["norm_spans"], **rest)
    torch.testing.assert_close(grad, torch.autograd.grad(apart[1 - unused].square().sum(), h)[0])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_do_not_see_their_neighbours(backend, dtype):
    made = fused(torch.Generator().manual_seed(0), (1,) * 37, 33, ("gate",))
    made = {n: v.to(dtype) if v.is_floating_point() else v for n, v in made.items()}
    whole = gated_residual_norm(**made)
    for i in range(0, 37, 5):
        alone = gated_residual_norm(**{n: made[n][i : i + 1] for n in ("h", "y", "gate")}, spans=spans((0, 1)))
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, whole, strict=True))

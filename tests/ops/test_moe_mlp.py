"""moe_mlp: the shared suite, and what experts over contiguous groups must keep."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import BF16, FP32, Case, DifferentiableOpSuite, Mistake, normal, spans
from torch.nn import functional

from uvg_engine.backends import triton
from uvg_engine.ops import moe_mlp


def offsets(*bounds):
    return torch.tensor(bounds, dtype=torch.int32)


def experts(g, bounds, width, hidden):
    num = len(bounds) - 1
    return {
        "x": normal(g, bounds[-1], width),
        "w1": normal(g, num, hidden, width) * width**-0.5,
        "b1": normal(g, num, hidden),
        "w2": normal(g, num, width, hidden) * hidden**-0.5,
        "b2": normal(g, num, width),
        "group_offsets": offsets(*bounds),
    }


def case(name, *args, **more):
    return Case(name, lambda g: experts(g, *args) | more)


class TestMoeMlp(DifferentiableOpSuite):
    op = "moe_mlp"
    cases = (
        case("two-modalities", (0, 5, 8), 6, 9),
        case("spans", (0, 5, 12), 6, 9, row_spans=spans((0, 3), (3, 2), (5, 0), (5, 7))),
        case("a-span-of-both", (0, 5, 12), 6, 9, row_spans=spans((0, 9), (9, 3))),
        case("empty-experts", (0, 0, 7, 7, 9, 9), 13, 31),
        case("all-with-one", (0, 0, 11, 11), 8, 16),
        case("no-rows", (0, 0, 0), 8, 16),
        case("one-element", (0, 1), 1, 1),
        case("one-row", (0, 0, 1, 1), 17, 5),
        case("many-experts", tuple(range(0, 19, 2)) + (18, 18, 31), 7, 11),
        case("no-experts-no-rows", (0,), 4, 8),
        case("block-and-one", (0, 33, 98), 65, 129),
        case("two-parts-of-the-hidden-width", (0, 7, 7, 9), 5, 1701),
        case("three-parts-of-the-hidden-width", (0, 3), 5, 3100),
    )
    mistakes = (
        Mistake(r"x must be a floating-point \(T, D\)", {"x": lambda x: x[0]}),
        Mistake(r"w1 must be a floating-point \(E, F, D\)", {"w1": lambda w: w[0]}),
        Mistake(r"w1 must be \(2, 9, 6\) torch.float32", {"w1": lambda w: w[..., 1:]}),
        Mistake(r"b1 must be \(2, 9\) torch.float32", {"b1": lambda b: b.double()}),
        Mistake(r"w2 must be \(2, 6, 9\) torch.float32", {"w2": lambda w: w.mT}),
        Mistake(r"b2 must be \(2, 6\) torch.float32", {"b2": lambda b: b[0]}),
        Mistake(r"group_offsets must be \(3,\) torch.int32", {"group_offsets": lambda o: o.long()}),
        Mistake("group_offsets must ascend from 0 to T = 8", {"group_offsets": offsets(0, 5, 7)}),
        Mistake("group_offsets must ascend from 0 to T = 8", {"group_offsets": offsets(0, 9, 8)}),
        Mistake("group_offsets must ascend from 0 to T = 8", {"group_offsets": offsets(1, 5, 8)}),
        Mistake("group_offsets must ascend from 0 to T = 8", {"group_offsets": offsets(0, -5, 8)}),
        Mistake(r"row_spans must be an int32 \(S, 2\)", {"row_spans": spans((0, 8)).long()}),
        Mistake(r"row_spans must tile \[0, 8\) in order", {"row_spans": spans((0, 4))}),
    )


def dense(x, made, e):
    hidden = functional.gelu(functional.linear(x, made["w1"][e], made["b1"][e]), approximate="tanh")
    return functional.linear(hidden, made["w2"][e], made["b2"][e])


def test_equals_each_expert_alone():
    made = experts(torch.Generator().manual_seed(0), (0, 5, 5, 12), 6, 9)
    want = torch.cat([dense(made["x"][:5], made, 0), dense(made["x"][5:], made, 2)])
    torch.testing.assert_close(moe_mlp(**made), want)


def in_dtype(made, dtype):
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in made.items()}


def test_identity_experts_return_x(backend):
    """gelu(u) - gelu(-u) = u, so W1 = [I; -I] and W2 = [I, -I] pass x through."""
    x, eye = normal(torch.Generator().manual_seed(0), 9, 5).float(), torch.eye(5)
    w1, w2 = torch.cat([eye, -eye]).expand(3, 10, 5), torch.cat([eye, -eye], 1).expand(3, 5, 10)
    out = moe_mlp(x, w1, torch.zeros(3, 10), w2, torch.zeros(3, 5), offsets(0, 2, 2, 9))
    torch.testing.assert_close(out, x, rtol=1e-6, atol=1e-6)


def test_permuting_rows_of_a_group_permutes_the_outputs(backend):
    g = torch.Generator().manual_seed(0)
    made = in_dtype(experts(g, (0, 5, 12), 6, 9), FP32)
    order = torch.cat([torch.randperm(5, generator=g), 5 + torch.randperm(7, generator=g)])
    got = moe_mlp(**(made | {"x": made["x"][order]}))
    torch.testing.assert_close(got, moe_mlp(**made)[order], rtol=1e-5, atol=1e-6)


def test_permuting_experts_moves_their_groups(backend):
    made = in_dtype(experts(torch.Generator().manual_seed(0), (0, 5, 12), 6, 9), FP32)
    names = ("w1", "b1", "w2", "b2")
    turned = {n: made[n].flip(0) for n in names} | {"x": torch.cat([made["x"][5:], made["x"][:5]])}
    out = moe_mlp(**turned, group_offsets=offsets(0, 7, 12))
    torch.testing.assert_close(torch.cat([out[7:], out[:7]]), moe_mlp(**made), rtol=1e-5, atol=1e-6)


def test_a_batch_is_its_parts(backend):
    made = in_dtype(experts(torch.Generator().manual_seed(0), (0, 5, 12), 6, 9), FP32)
    parts = [
        moe_mlp(**(made | {"x": made["x"][first:last], "group_offsets": offsets(*bounds)}))
        for first, last, bounds in ((0, 2, (0, 2, 2)), (2, 8, (0, 3, 6)), (8, 12, (0, 0, 4)))
    ]
    torch.testing.assert_close(torch.cat(parts), moe_mlp(**made), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(triton.interpreting(), reason="thousands of tiles take Triton's interpreter minutes")
def test_groups_of_very_different_sizes(backend):
    """As of a large video and a few words: 32,760 rows, none, 1, 7 and 256."""
    bounds = (0, 32760, 32760, 32761, 32768, 33024)
    made = in_dtype(experts(torch.Generator().manual_seed(0), bounds, 16, 24), FP32)
    want = torch.cat([dense(made["x"][a:b], made, e) for e, (a, b) in enumerate(itertools.pairwise(bounds))])
    torch.testing.assert_close(moe_mlp(**made), want, rtol=1e-5, atol=2e-6)


def test_groups_do_not_see_each_other(backend):
    made = in_dtype(experts(torch.Generator().manual_seed(0), (0, 5, 12), 6, 9), FP32)
    whole = moe_mlp(**made)
    made["x"][:5] = torch.nan
    assert torch.equal(moe_mlp(**made)[5:], whole[5:])


# Blocks of what is summed over, whole ones and not. Triton's have 64 at most, and its interpreter is slow.
SIZES = [(6, 13), (128, 192), (133, 70)] if triton.interpreting() else [(6, 13), (128, 512), (1541, 70)]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("width, hidden", SIZES)
def test_a_span_is_what_it_is_alone(backend, dtype, width, hidden):
    """Bitwise, whatever stands beside it and however many rows its expert has."""
    made = in_dtype(experts(torch.Generator().manual_seed(0), (0, 200, 301), width, hidden), dtype)
    table = spans((0, 1), (1, 7), (8, 192), (200, 8), (208, 93))
    whole = moe_mlp(**made, row_spans=table)
    for start, length in table.tolist():
        bounds = (0, length, length) if start < 200 else (0, 0, length)
        alone = made | {"x": made["x"][start : start + length], "group_offsets": offsets(*bounds)}
        assert torch.equal(moe_mlp(**alone, row_spans=spans((0, length))), whole[start : start + length])


def test_a_long_group_is_what_its_parts_are(monkeypatch):
    """The cpu kernel takes a long group in several turns, so that hidden rows stay in the cache. The backward reads all
    of them."""
    from uvg_engine.backends.cpu import moe_mlp as kernel

    made = in_dtype(experts(torch.Generator().manual_seed(0), (0, 200, 301), 8, 16), FP32)
    made["x"].requires_grad_()

    def results():
        out = moe_mlp(**made)
        return out.detach(), torch.autograd.grad(out, made["x"], torch.ones_like(out))[0]

    want = results()
    monkeypatch.setattr(kernel, "_FEWEST_ROWS", 7)
    monkeypatch.setattr(kernel, "_ROOM_BYTES", 0)
    assert all(torch.equal(got, true) for got, true in zip(results(), want, strict=True))


def test_linear_in_the_second_layer(backend):
    made = in_dtype(experts(torch.Generator().manual_seed(0), (0, 5, 12), 6, 9), FP32)
    twice = made | {n: 2 * made[n] for n in ("w2", "b2")}
    assert torch.equal(moe_mlp(**twice), 2 * moe_mlp(**made))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_an_empty_expert_changes_nothing(backend, dtype):
    made = TestMoeMlp.cases[0].inputs(dtype)
    names = ("w1", "b1", "w2", "b2")
    poison = {n: torch.cat([made[n][:1], torch.full_like(made[n][:1], torch.nan), made[n][1:]]) for n in names}
    got_weights = {n: poison[n].requires_grad_() for n in names}
    got = moe_mlp(made["x"], **got_weights, group_offsets=offsets(0, 5, 5, 8))
    assert torch.equal(got, moe_mlp(**made))
    grads = torch.autograd.grad(got.sum(), list(got_weights.values()))
    assert all(not grad[1].any() for grad in grads)


def test_one_expert_with_everything_is_the_dense_mlp(backend):
    made = next(c for c in TestMoeMlp.cases if c.name == "all-with-one").inputs(FP32)
    torch.testing.assert_close(moe_mlp(**made), dense(made["x"], made, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_slope_of_gelu_far_from_0(on_cpu, dtype):
    """Where the cube of a value is no number any more."""
    x = torch.tensor([1e2, 1e5, 6e12, 1e14, 1e18], dtype=dtype)[:, None]
    x = torch.cat([x, -x]).requires_grad_()
    one, zero = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    (slope,) = torch.autograd.grad(moe_mlp(x, one, zero, one, zero, offsets(0, 10)).sum(), x)
    torch.testing.assert_close(slope.flatten().float(), torch.tensor([1.0] * 5 + [0.0] * 5), rtol=0, atol=1e-30)

"""qk_norm_rope: the shared suite, and rotations checked as complex numbers and by their invariances."""

from __future__ import annotations

import pytest
import torch
from harness import BF16, FP32, FP64, Case, DifferentiableOpSuite, Mistake, normal, spans

from uvg_engine.ops import qk_norm_rope

VIDEO, TEXT = 0, 1


def table_of(angle):
    """[2, P, H/2] angles to the [2, P, H/2, 2] table of (cos, sin)."""
    return torch.stack([angle.cos(), angle.sin()], -1)


def made(g, rows, rope_spans, heads, head_dim, positions=16):
    return {
        "q": normal(g, rows, heads * head_dim),
        "k": normal(g, rows, heads * head_dim),
        "weight_q": 1 + 0.1 * normal(g, heads * head_dim),
        "weight_k": 1 + 0.1 * normal(g, heads * head_dim),
        "rope_spans": spans(*rope_spans) if rope_spans else torch.zeros(0, 6, dtype=torch.int32),
        "rope_table": table_of(normal(g, 2, positions, head_dim // 2)),
        "num_heads": heads,
    }


def case(name, *args, wide=("rope_table",), without=()):
    def make(g):
        return made(g, *args) | dict.fromkeys(without)

    return Case(name, make, wide, constant=("rope_table",))


K = ("k", "weight_k")
ROTATION = ("rope_spans", "rope_table", "num_heads")


MIXED = ((0, 12, VIDEO, 2, 3, 2), (12, 0, VIDEO, 0, 0, 0), (12, 5, TEXT, 0, 0, 0))


GRIDS = ((1, 2, 3), (0, 4, 4), (2, 2, 1), (1, 1, 1))
LENGTHS = [6, 0, 4, 1, *[(5 * i) % 7 for i in range(10)]]
STARTS = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
MANY = [(s, n, VIDEO, *g) for s, n, g in zip(STARTS, LENGTHS, GRIDS)]
MANY += [(s, n, TEXT, 0, 0, 0) for s, n in zip(STARTS[4:], LENGTHS[4:])]

NEAR = ((0, 4, VIDEO, 1, 2, 2), (4, 3, TEXT, 0, 0, 0), (7, 3, VIDEO, 1, 3, 1))  # both kinds in a block; one row bare


class TestQkNormRope(DifferentiableOpSuite):
    op = "qk_norm_rope"
    cases = (
        case("mixed", 18, MIXED, 2, 8),
        case("text-before-video", 19, ((0, 7, TEXT, 0, 0, 0), (7, 12, VIDEO, 1, 4, 3)), 3, 10),
        case("narrowest-head", 4, ((0, 4, TEXT, 0, 0, 0),), 1, 2),
        case("no-rows", 0, ((0, 0, TEXT, 0, 0, 0),), 2, 4),
        case("no-spans", 3, (), 2, 4),
        case("one-row", 1, ((0, 1, VIDEO, 1, 1, 1),), 1, 6),
        case("many-spans", 44, MANY, 2, 12),
        case("wide-weights", 18, MIXED, 2, 8, wide=("rope_table", "weight_q", "weight_k")),
        case("wan-heads", 31, ((0, 24, VIDEO, 3, 2, 4), (24, 7, TEXT, 0, 0, 0)), 3, 128),
        case("q-alone", 18, MIXED, 2, 8, without=K),
        case("no-rotation", 70, (), 1, 37, without=ROTATION),
        case("q-alone-no-rotation", 131, (), 3, 32, without=K + ROTATION),
        case("in-parts", 11, NEAR, 27, 78),  # rows that Triton takes in parts: odd halves of a head, and fp32
        case("in-parts-q-alone", 11, NEAR, 33, 128, without=K),
        case("in-parts-no-rotation", 9, (), 1, 2051, without=K + ROTATION),
        case("q-alone-no-rows", 0, (), 1, 6, without=K + ROTATION),
    )
    mistakes = (
        Mistake(r"q must be a floating-point \(T, D\)", {"q": lambda q: q[0]}),
        Mistake(r"k must be \(18, 16\) torch.float32", {"k": lambda k: k[1:]}),
        Mistake(r"k must be \(18, 16\) torch.float32", {"k": lambda k: k.double()}),
        Mistake(r"weight_q must be \(16,\)", {"weight_q": torch.ones(8)}),
        Mistake(r"weight_k must be \(16,\)", {"weight_k": torch.ones(8)}),
        Mistake("k and weight_k must be given together", {"k": None}),
        Mistake("k and weight_k must be given together", {"weight_k": None}),
        Mistake("rope_spans, rope_table and num_heads must be given together", {"rope_spans": None}),
        Mistake("rope_spans, rope_table and num_heads must be given together", {"rope_table": None}),
        Mistake("rope_spans, rope_table and num_heads must be given together", {"num_heads": None}),
        Mistake(r"num_heads must divide D = 16 into even head widths", {"num_heads": 3}),
        Mistake(r"num_heads must divide D = 16 into even head widths", {"num_heads": 16}),
        Mistake(r"num_heads must divide D = 16 into even head widths", {"num_heads": 0}),
        Mistake(r"rope_spans must be an int32 \(S, 6\)", {"rope_spans": spans((0, 18))}),
        Mistake(r"rope_table must be \(2, 16, 4, 2\)", {"rope_table": torch.zeros(2, 16, 3, 2)}),
        Mistake("rope_table must not require a gradient", {"rope_table": lambda t: t.clone().requires_grad_()}),
        Mistake(r"rope_spans must lie in \[0, 18\)", {"rope_spans": spans((14, 5, TEXT, 0, 0, 0))}),
        Mistake(r"rope_spans must lie in \[0, 18\)", {"rope_spans": spans((-1, 5, TEXT, 0, 0, 0))}),
        Mistake("rope_spans must not overlap", {"rope_spans": spans((0, 5, TEXT, 0, 0, 0), (4, 5, TEXT, 0, 0, 0))}),
        Mistake("rope_spans must be of kind 0 or 1", {"rope_spans": spans((0, 5, 2, 0, 0, 0))}),
        Mistake(r"rope_spans must have len = F\*Y\*X for video", {"rope_spans": spans((0, 12, VIDEO, 2, 3, 3))}),
        Mistake(r"rope_spans must have len = F\*Y\*X for video", {"rope_spans": spans((0, 12, VIDEO, 2, -3, -2))}),
        Mistake(
            "rope_spans must stay within the table's 16 positions", {"rope_spans": spans((0, 18, VIDEO, 1, 1, 18))}
        ),
        Mistake("rope_spans must stay within the table's 16 positions", {"rope_spans": spans((0, 17, TEXT, 0, 0, 0))}),
    )


def rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def test_text_equals_rotate_half_by_complex_numbers():
    g = torch.Generator().manual_seed(0)
    inputs = made(g, 9, ((0, 9, TEXT, 0, 0, 0),), 2, 8)
    angle = torch.arange(16)[:, None] * 10000.0 ** (-torch.arange(4, dtype=FP64) / 4)
    inputs["rope_table"] = table_of(torch.stack([torch.zeros_like(angle), angle]))
    x = rms(inputs["q"], inputs["weight_q"]).unflatten(-1, (2, 2, 4))  # head, half, pair
    turned = torch.complex(x[:, :, 0], x[:, :, 1]) * torch.polar(torch.ones(9, 1, 4, dtype=FP64), angle[:9, None])
    want = torch.stack([turned.real, turned.imag], 2).flatten(1)
    torch.testing.assert_close(qk_norm_rope(**inputs)[0], want)


def test_video_equals_interleaved_pairs_by_complex_numbers():
    frames, height, width, head_dim = 2, 3, 4, 14  # pairs: 3 of the frame, 2 of y, 2 of x
    rows = frames * height * width
    g = torch.Generator().manual_seed(0)
    inputs = made(g, rows, ((0, rows, VIDEO, frames, height, width),), 1, head_dim)
    angle = normal(g, 16, head_dim // 2)
    inputs["rope_table"] = table_of(torch.stack([angle, torch.zeros_like(angle)]))
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width))
    turn = torch.cat([angle[grid[:, 0], :3], angle[grid[:, 1], 3:5], angle[grid[:, 2], 5:]], 1)
    x = rms(inputs["k"], inputs["weight_k"]).unflatten(-1, (-1, 2)).contiguous()
    want = torch.view_as_real(torch.view_as_complex(x) * torch.polar(torch.ones_like(turn), turn)).flatten(1)
    torch.testing.assert_close(qk_norm_rope(**inputs)[1], want)


def test_rotation_keeps_lengths_and_uncovered_rows_are_only_normed(backend):
    inputs = TestQkNormRope.cases[0].inputs(FP32)
    q, _ = qk_norm_rope(**inputs)
    want = rms(inputs["q"], inputs["weight_q"])
    torch.testing.assert_close(q.unflatten(-1, (2, 8)).norm(dim=-1), want.unflatten(-1, (2, 8)).norm(dim=-1))
    torch.testing.assert_close(q[17], want[17])


def test_the_scale_of_a_row_does_not_matter(backend):
    inputs = TestQkNormRope.cases[0].inputs(FP32)
    want = qk_norm_rope(**inputs, eps=0.0)
    got = qk_norm_rope(**(inputs | {"q": 0.25 * inputs["q"], "k": 1024 * inputs["k"]}), eps=0.0)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))  # powers of two are exact


def test_spans_may_come_in_any_order(backend):
    inputs = TestQkNormRope.cases[0].inputs(FP32)
    got = qk_norm_rope(**(inputs | {"rope_spans": inputs["rope_spans"].flip(0)}))
    assert all(torch.equal(a, b) for a, b in zip(got, qk_norm_rope(**inputs), strict=True))


def test_q_and_k_do_not_see_each_other(backend):
    inputs = TestQkNormRope.cases[0].inputs(FP32)
    q, k = qk_norm_rope(**inputs)
    turned = {"q": inputs["k"], "k": inputs["q"], "weight_q": inputs["weight_k"], "weight_k": inputs["weight_q"]}
    k_turned, q_turned = qk_norm_rope(**(inputs | turned))
    assert torch.equal(q, q_turned) and torch.equal(k, k_turned)


def test_q_alone_has_the_bits_of_q_beside_k(backend):
    inputs = TestQkNormRope.cases[0].inputs(BF16)
    alone, nothing = qk_norm_rope(**(inputs | dict.fromkeys(K)))
    assert torch.equal(alone, qk_norm_rope(**inputs)[0]) and nothing.shape == (0,) and not nothing.requires_grad


@pytest.mark.parametrize("without", [(), K], ids=["both", "q-alone"])
def test_no_rotation_is_a_rotation_of_no_row(backend, without):
    inputs = TestQkNormRope.cases[0].inputs(FP32) | dict.fromkeys(without)
    bare = inputs | dict.fromkeys(ROTATION)
    none = inputs | {"rope_spans": torch.zeros(0, 6, dtype=torch.int32)}
    slack = 1e-6 if backend == "triton" else 0  # Triton's rows without rotation take another kernel
    for a, b in zip(qk_norm_rope(**bare), qk_norm_rope(**none), strict=True):
        torch.testing.assert_close(a, b, rtol=slack, atol=slack)
    torch.testing.assert_close(qk_norm_rope(**bare)[0], rms(inputs["q"], inputs["weight_q"]))


def test_text_scores_depend_on_distance_alone():
    g = torch.Generator().manual_seed(0)
    inputs = made(g, 8, ((0, 8, TEXT, 0, 0, 0),), 1, 8)
    angle = torch.arange(16)[:, None] * 0.3 ** torch.arange(4, dtype=FP64)
    inputs["rope_table"] = table_of(torch.stack([angle, angle]))
    inputs["q"], inputs["k"] = (x[:1].expand(8, 8) for x in (inputs["q"], inputs["k"]))
    q, k = qk_norm_rope(**inputs)
    scores = q @ k.T
    torch.testing.assert_close(scores[:-1, :-1], scores[1:, 1:])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_samples_do_not_see_their_neighbours(backend, dtype):
    case = TestQkNormRope.cases[0]
    inputs = case.inputs(dtype)
    q, k = qk_norm_rope(**inputs)
    for first, last, span in ((0, 12, MIXED[0]), (12, 17, (0, 5, TEXT, 0, 0, 0)), (17, 18, (0, 0, TEXT, 0, 0, 0))):
        alone = inputs | {n: inputs[n][first:last] for n in "qk"} | {"rope_spans": spans(span)}
        assert all(torch.equal(a, b[first:last]) for a, b in zip(qk_norm_rope(**alone), (q, k), strict=True))


def test_one_result_may_go_unused(backend):
    inputs = TestQkNormRope.cases[0].inputs(FP32)
    inputs["q"].requires_grad_(), inputs["k"].requires_grad_()
    qk_norm_rope(**inputs)[0].sum().backward()
    assert inputs["q"].grad.abs().sum() > 0 and not inputs["k"].grad.any()

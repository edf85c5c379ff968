"""linear_sample: the shared suite, the draw against its definition and distribution, independence of neighbours."""

from __future__ import annotations

import math
from types import MappingProxyType

import pytest
import torch
from harness import BF16, FP32, FP64, Case, ConstantOpSuite, Mistake, normal
from scipy import stats
from torch.nn import functional

from uvg_engine.backends import triton
from uvg_engine.ops import linear_sample
from uvg_engine.reference import philox

NAMES = ("seeds", "steps", "tokens")


def head(g, rows, width, vocab, temperature=1.0):
    draw = {name: torch.randint(-(2**62), 2**62, (rows,), generator=g) if name == "seeds" else None for name in NAMES}
    draw |= {name: torch.randint(2**31, (rows,), generator=g) for name in NAMES[1:]}
    weight, bias = normal(g, vocab, width) * width**-0.5, normal(g, vocab)
    return {"x": normal(g, rows, width), "weight": weight, "bias": bias, **draw, "temperature": temperature}


def case(name, *args, **kwargs):
    return Case(name, lambda g: head(g, *args, **kwargs), constant=("x", "weight", "bias"))


def plain(backend, g, *args, **kwargs):
    """What the backend takes: the numbers of `head` in fp32, or bf16 where it has tensor cores alone."""
    dtype = BF16 if backend == "cuda" else FP32
    return {n: v.to(dtype) if n in ("x", "weight", "bias") else v for n, v in head(g, *args, **kwargs).items()}


def exact_logits(made):
    return functional.linear(*(made[n].double() for n in ("x", "weight", "bias")))


class TestLinearSample(ConstantOpSuite):
    op = "linear_sample"
    plainest = MappingProxyType({"cuda": (3, BF16)})
    cases = (
        case("three-tiles", 11, 5, 2500),
        case("few-words", 13, 3, 7),
        case("tile", 5, 8, 1024),
        case("tile-and-one", 5, 8, 1025),
        case("blocks", 70, 72, 1100),
        case("blocks-greedy", 66, 136, 130, temperature=0.0),
        case("one-row", 1, 7, 1023),
        case("one-word", 3, 4, 1),
        case("no-rows", 0, 4, 9),
        case("greedy", 11, 5, 2500, temperature=0.0),
        case("cold", 11, 5, 2500, temperature=0.1),
        case("hot", 11, 5, 2500, temperature=7.0),
    )
    interpreted = MappingProxyType(dict.fromkeys(("three-tiles", "tile", "greedy", "cold", "hot"), (BF16,)))
    mistakes = (
        Mistake(r"x must be a floating-point \(L, D\)", {"x": lambda x: x[0]}),
        Mistake(r"weight must be \(2500, 5\) torch.float32", {"weight": lambda w: w.double()}),
        Mistake(r"bias must be \(2500,\) torch.float32", {"bias": lambda b: b[1:]}),
        Mistake(r"seeds must be \(11,\) torch.int64", {"seeds": lambda s: s.int()}),
        Mistake(r"steps must be \(11,\) torch.int64", {"steps": lambda s: s[1:]}),
        Mistake(r"tokens must be \(11,\) torch.int64", {"tokens": lambda s: s[:, None]}),
        Mistake("temperature must be finite and at least 0", {"temperature": -0.1}),
        Mistake("temperature must be finite and at least 0", {"temperature": math.inf}),
        Mistake("temperature must be finite and at least 0", {"temperature": math.nan}),
    )


def uniforms(made, tile):
    return [
        philox.uniform(w, FP64) for w in philox.words(*(made[n] for n in NAMES[:2]), philox.DRAW, made["tokens"], tile)
    ]


def test_one_tile_is_the_inverse_cdf_of_lane_zero(backend):
    made = plain(backend, torch.Generator().manual_seed(0), 50, 8, 1000)
    cdf = exact_logits(made).softmax(-1).cumsum(-1)
    want = torch.searchsorted(cdf, uniforms(made, 0)[0][:, None], right=True)[:, 0]
    assert torch.equal(linear_sample(**made), want)


def test_lane_one_replaces_the_running_choice_by_its_share(backend):
    made = plain(backend, torch.Generator().manual_seed(0), 60, 8, 2100)
    p = exact_logits(made).softmax(-1)
    want, running = torch.zeros(60, dtype=torch.int64), torch.zeros(60, dtype=FP64)
    for tile, start in enumerate((0, 1024, 2048)):
        part = p[:, start : start + 1024]
        inside, between = uniforms(made, tile)[:2]
        pick = start + torch.searchsorted(part.cumsum(-1), (inside * part.sum(-1))[:, None], right=True)[:, 0]
        running += part.sum(-1)
        want = torch.where(between < part.sum(-1) / running, pick, want)
    assert len(set((want // 1024).tolist())) == 3
    assert torch.equal(linear_sample(**made), want)


@pytest.mark.parametrize("vocab, temperature, draws", [(7, 1.0, 3000), (7, 2.5, 3000), (2500, 1.0, 8000)])
def test_the_distribution_is_softmax(backend, vocab, temperature, draws):
    """Chi-square over 7 bins of like probability; a wrong tile weight moves the bins of other tiles."""
    if backend == "cuda" or (backend == "triton" and triton.interpreting()):
        draws //= 10
    g = torch.Generator().manual_seed(7)
    made = plain(backend, g, 1, 8, vocab, temperature)
    logits = exact_logits(made)[0] / temperature
    many = {"x": made["x"].expand(draws, 8), "seeds": made["seeds"].expand(draws), "steps": torch.arange(draws)}
    ids = linear_sample(**(made | many | {"tokens": torch.arange(draws) % 5}))
    counts, expected = torch.bincount(ids, minlength=vocab).double(), draws * logits.softmax(0)
    bins = torch.arange(vocab) * 7 // vocab
    assert p_value(*(torch.zeros(7, dtype=FP64).index_add(0, bins, v) for v in (counts, expected))) > 1e-3
    assert p_value(counts, expected) > 1e-3


def p_value(counts, expected):
    """Of a chi-square test; what is expected less than five times counts as one."""
    rare = expected < 5
    counts, expected = (torch.cat([v[~rare], v[rare].sum()[None]]) for v in (counts, expected))
    return stats.chisquare(counts[expected > 0].numpy(), expected[expected > 0].numpy()).pvalue


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_do_not_see_their_neighbours(backend, dtype, temperature):
    """Close to even odds everywhere, so that a single bit of a logit would show in some draw."""
    g = torch.Generator().manual_seed(0)
    made = head(g, 37, 32, 1500, temperature)
    made |= {n: made[n].to(dtype) for n in ("x", "weight", "bias")}
    whole = linear_sample(**made)
    rows = ("x", *NAMES)
    turned = torch.randperm(37, generator=g)
    assert torch.equal(linear_sample(**(made | {n: made[n][turned] for n in rows})), whole[turned])
    for i in range(0, 37, 9 if backend == "triton" and triton.interpreting() else 1):
        assert torch.equal(linear_sample(**(made | {n: made[n][i : i + 1] for n in rows})), whole[i : i + 1])
    assert torch.equal(linear_sample(**(made | {n: made[n][5:18] for n in rows})), whole[5:18])


def test_greedy_is_argmax_and_ties_go_to_the_lowest(backend):
    made = plain(backend, torch.Generator().manual_seed(0), 40, 8, 2500, temperature=0.0)
    assert torch.equal(linear_sample(**made), exact_logits(made).argmax(-1))
    bias = torch.zeros_like(made["bias"])
    bias[[700, 701, 1900]] = 1
    assert bool((linear_sample(**(made | {"weight": torch.zeros_like(made["weight"]), "bias": bias})) == 700).all())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_words_at_minus_infinity_never_come(backend, temperature):
    made = plain(backend, torch.Generator().manual_seed(0), 200, 8, 2500, temperature)
    allowed = torch.tensor([1100, 1101, 2400])
    bias = torch.full_like(made["bias"], -math.inf)
    bias[allowed] = 0
    ids = linear_sample(**(made | {"bias": bias}))
    assert torch.isin(ids, allowed).all() and len(ids.unique()) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("place", [3, 2000])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_without_a_distribution_gives_minus_one(backend, temperature, place, value):
    made = plain(backend, torch.Generator().manual_seed(0), 5, 8, 2500, temperature)
    bias = made["bias"].clone()
    bias[place] = value
    assert linear_sample(**(made | {"bias": bias})).tolist() == [-1] * 5
    assert linear_sample(**(made | {"bias": torch.full_like(bias, -math.inf)})).tolist() == [-1] * 5


def test_huge_logits_stay_finite(backend):
    made = plain(backend, torch.Generator().manual_seed(0), 20, 8, 2500)
    bias = made["bias"] * 1e30
    assert bool((linear_sample(**(made | {"bias": bias})) == bias.argmax()).all())


def test_the_coldest_temperature_is_greedy(backend):
    made = plain(backend, torch.Generator().manual_seed(0), 20, 8, 2500, temperature=5e-324)
    assert torch.equal(linear_sample(**made), exact_logits(made).argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_scale_and_shift_of_the_logits(backend, temperature):
    """Logits and temperature times a power of two, or logits plus a constant (in exact numbers), draw the same."""
    made = plain(backend, torch.Generator().manual_seed(0), 40, 8, 2500, temperature)
    want = linear_sample(**made)
    scaled = {n: 4 * made[n] for n in ("weight", "bias")} | {"temperature": 4 * temperature}
    assert torch.equal(linear_sample(**(made | scaled)), want)
    exact = {"weight": torch.zeros_like(made["weight"]), "bias": (8 * made["bias"]).round() / 8}
    moved = exact | {"bias": exact["bias"] + 16}
    assert torch.equal(linear_sample(**(made | exact)), linear_sample(**(made | moved)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_of_nan_spoils_no_other(backend, temperature):
    made = plain(backend, torch.Generator().manual_seed(0), 9, 8, 1500, temperature)
    want = linear_sample(**made)
    made["x"][4] = math.nan
    want[4] = -1
    assert torch.equal(linear_sample(**made), want)


def test_a_draw_has_its_own_name(backend):
    """Each part of the name changes draws: seed, step and token."""
    made = plain(backend, torch.Generator().manual_seed(0), 64, 8, 300)
    made |= {n: torch.zeros(64, dtype=torch.int64) for n in NAMES} | {"x": made["x"][:1].expand(64, 8)}
    assert len(linear_sample(**made).unique()) == 1
    for name in NAMES:
        assert len(linear_sample(**(made | {name: torch.arange(64)})).unique()) > 20
    high = torch.arange(64) << 32  # the upper half of a seed counts too
    assert len(linear_sample(**(made | {"seeds": high})).unique()) > 20

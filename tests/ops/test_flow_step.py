"""flow_step and jump_coins: the shared suite, garbage behind zero coefficients, neighbours, counters."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from harness import BF16, FP16, FP32, FP64, Case, ConstantOpSuite, Mistake, normal, spans

from uvg_engine.ops import flow_step, jump_coins
from uvg_engine.reference import philox

LATENTS = ("x", "v_cond", "v_uncond", "last", "m1", "m2")
TOKENS = ("tokens", "drawn")
NUMBERS = ("guidance", "coefs", "jump_prob")
PER_SAMPLE = (*NUMBERS, "seeds", "steps")


def tiled(lengths, first=0):
    """Spans of these lengths one after another."""
    return spans(*((first + sum(lengths[:i]), length) for i, length in enumerate(lengths)))


def step(g, latents, texts, without=(), gap=0):
    """One sample per length; `gap` rows before and after the spans belong to nobody."""
    samples, length = len(latents), sum(texts) + 2 * gap
    made = {name: normal(g, sum(latents) + 2 * gap) for name in LATENTS}
    made |= dict.fromkeys(without)
    made |= {"guidance": 5 * torch.rand(samples, generator=g, dtype=FP64), "coefs": normal(g, samples, 10)}
    for name, columns in (("last", [2]), ("m1", [4, 8]), ("m2", [5])):
        if name in without:
            made["coefs"][:, columns] = 0
    made |= {"tokens": torch.randint(1000, (length,), generator=g), "drawn": 2000 + torch.arange(length)}
    made |= {"jump_prob": torch.rand(samples, generator=g, dtype=FP64)}
    made |= {"seeds": torch.randint(-(2**62), 2**62, (samples,), generator=g)}
    made |= {"steps": torch.randint(100, (samples,), generator=g)}
    return made | {"latent_spans": tiled(latents, gap), "token_spans": tiled(texts, gap)}


def case(name, *args, **kwargs):
    return Case(name, lambda g: step(g, *args, **kwargs), NUMBERS, constant=(*LATENTS, *NUMBERS))


def one_sample(made, i):
    (a, n), (t, k) = made["latent_spans"][i].tolist(), made["token_spans"][i].tolist()
    cut = {name: made[name][a : a + n] for name in LATENTS} | {name: made[name][t : t + k] for name in TOKENS}
    return cut | {n: made[n][i : i + 1] for n in PER_SAMPLE} | {"latent_spans": tiled([n]), "token_spans": tiled([k])}


class TestFlowStep(ConstantOpSuite):
    op = "flow_step"
    cases = (
        case("four-samples", (7, 0, 13, 1), (5, 4, 0, 3)),
        case("rows-of-nobody", (7, 5), (2, 6), gap=3),
        case("no-history", (9, 4), (3, 3), without=("last", "m1", "m2")),
        case("no-guidance", (9, 4), (3, 3), without=("v_uncond",)),
        case("euler", (9, 4), (3, 3), without=("v_uncond", "last", "m1", "m2")),
        case("no-latents", (0, 0), (3, 2)),
        case("no-tokens", (4, 1), (0, 0)),
        case("no-samples", (), ()),
        case("one-of-each", (1,), (1,)),
        case("many-samples", [(5 * i) % 17 for i in range(40)], [(3 * i) % 7 for i in range(40)]),
        case("block-and-one", (1025, 31), (257, 63)),
    )
    mistakes = (
        Mistake(r"x must be a floating-point \(N\)", {"x": lambda x: x[None]}),
        Mistake(r"x must be a floating-point \(N\)", {"x": lambda x: x.int()}),
        *(
            Mistake(rf"{name} must be \(21,\) torch.float32", {name: change})
            for name in LATENTS[1:]
            for change in (lambda v: v[1:], lambda v: v.double())
        ),
        Mistake(r"coefs must be \(4, 10\)", {"coefs": lambda c: c[:, :9]}),
        Mistake("coefs must be float32 or float64", {"coefs": lambda c: c.int()}),
        Mistake(r"guidance must be \(4,\)", {"guidance": lambda c: c[1:]}),
        Mistake("guidance must be float32 or float64", {"guidance": lambda c: c.half()}),
        Mistake(r"jump_prob must be \(4,\)", {"jump_prob": lambda c: c[:, None]}),
        Mistake("jump_prob must be float32 or float64", {"jump_prob": lambda c: c.bfloat16()}),
        Mistake(r"tokens must be an int64 \(L\)", {"tokens": lambda t: t.int()}),
        Mistake(r"tokens must be an int64 \(L\)", {"tokens": lambda t: t[0]}),
        Mistake(r"drawn must be \(12,\) torch.int64", {"drawn": lambda t: t[1:]}),
        Mistake(r"drawn must be \(12,\) torch.int64", {"drawn": lambda t: t.float()}),
        Mistake(r"seeds must be \(4,\) torch.int64", {"seeds": lambda t: t[1:]}),
        Mistake(r"steps must be \(4,\) torch.int64", {"steps": lambda t: t.int()}),
        Mistake(r"latent_spans must be an int32 \(S, 2\)", {"latent_spans": lambda s: s[0]}),
        Mistake(r"latent_spans must be an int32 \(S, 2\)", {"latent_spans": lambda s: s.long()}),
        Mistake(r"token_spans must be \(4, 2\)", {"token_spans": lambda s: s[1:]}),
        Mistake(r"latent_spans must lie in \[0, 21\)", {"latent_spans": tiled((7, 0, 13, 2))}),
        Mistake(r"latent_spans must lie in \[0, 21\)", {"latent_spans": lambda s: s - 1}),
        Mistake(r"token_spans must lie in \[0, 12\)", {"token_spans": tiled((5, 4, 0, 4))}),
        Mistake("latent_spans must not overlap", {"latent_spans": spans((0, 7), (7, 0), (6, 13), (20, 1))}),
        Mistake("token_spans must not overlap", {"token_spans": spans((0, 5), (5, 4), (9, 0), (8, 3))}),
        *(
            Mistake(f"{name} must be given where its coefficient is not zero", {name: None})
            for name in ("last", "m1", "m2")
        ),
    )


def batch(dtype=FP32):
    return TestFlowStep.cases[0].inputs(dtype)


def assert_equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_matches_the_formula_per_sample():
    made = batch(FP64)
    x_next, xc, m, tokens = flow_step(**made)
    for i, (a, n) in enumerate(made["latent_spans"].tolist()):
        s = slice(a, a + n)
        c, g = made["coefs"][i], made["guidance"][i]
        x, vc, vu, last, m1, m2 = (made[name][s] for name in LATENTS)
        v = vu + g * (vc - vu)
        want_m = x + c[0] * v
        want_xc = c[1] * x + c[2] * last + c[3] * want_m + c[4] * m1 + c[5] * m2
        torch.testing.assert_close(m[s], want_m)
        torch.testing.assert_close(xc[s], want_xc)
        torch.testing.assert_close(x_next[s], c[6] * want_xc + c[7] * want_m + c[8] * m1 + c[9] * v)
    coins = jump_coins(made["jump_prob"], made["seeds"], made["steps"], made["token_spans"], 12)
    assert torch.equal(tokens, torch.where(coins, made["drawn"], made["tokens"]))
    assert 0 < coins.sum() < len(coins)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_batch_of_four_equals_four_batches_bitwise(backend, dtype):
    made = batch(dtype)
    alone = [flow_step(**one_sample(made, i)) for i in range(4)]
    assert_equal(flow_step(**made), [torch.cat(parts) for parts in zip(*alone)])


def test_samples_may_come_in_any_order(backend):
    made = batch()
    turned = made | {n: made[n].flip(0) for n in (*PER_SAMPLE, "latent_spans", "token_spans")}
    assert_equal(flow_step(**turned), flow_step(**made))


def test_rows_of_nobody_stay(backend):
    made = TestFlowStep.cases[1].inputs(FP32)
    *latents, tokens = flow_step(**(made | {"jump_prob": torch.ones(2)}))
    for value in latents:
        assert torch.equal(value[:3], made["x"][:3]) and torch.equal(value[-3:], made["x"][-3:])
    assert torch.equal(tokens[[0, 1, 2, -3, -2, -1]], made["tokens"][[0, 1, 2, -3, -2, -1]])
    assert torch.equal(tokens[3:-3], made["drawn"][3:-3])


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), None])
def test_zero_coefficients_let_nothing_through(backend, garbage):
    made = batch()
    made["coefs"] = torch.tensor([[0, 1, 0, 0, 0, 0, 1, 0, 0, -0.1]]).repeat(4, 1)
    clean = flow_step(**made)
    for name in ("last", "m1", "m2"):
        made[name] = None if garbage is None else torch.full_like(made["x"], garbage)
    assert_equal(flow_step(**made), clean)


def test_garbage_of_one_sample_spoils_no_other(backend):
    made = batch()
    want = flow_step(**made)
    for name in LATENTS[1:]:
        made[name][7:20] = torch.nan
    got = flow_step(**made)
    for a, b in zip(got[:3], want[:3], strict=True):
        assert torch.equal(a[:7], b[:7]) and torch.equal(a[20:], b[20:]) and a[7:20].isnan().all()


def test_unguided_samples_ignore_garbage_velocities(backend):
    made = batch() | {"guidance": torch.ones(4)}
    want = flow_step(**(made | {"v_uncond": None}))
    assert_equal(flow_step(**(made | {"v_uncond": torch.full_like(made["x"], torch.nan)})), want)


def test_held_samples_stay_as_they_are(backend):
    hold = {"coefs": torch.tensor([[0.0, 1, 0, 0, 0, 0, 1, 0, 0, 0]]).repeat(4, 1), "jump_prob": torch.zeros(4)}
    made = batch(BF16) | hold
    made["v_cond"] = torch.full_like(made["x"], torch.nan)
    x, xc, _, tokens = flow_step(**made)
    assert_equal((x, xc, tokens), (made["x"], made["x"], made["tokens"]))


def test_constant_velocity_lands_on_the_data(backend):
    """x = (1-s)*data + s*noise moves by v = noise - data: any number of Euler steps ends at the data."""
    g = torch.Generator().manual_seed(0)
    data, noise = normal(g, 33).float(), normal(g, 33).float()
    for count in (1, 2, 7):
        sigmas, x = torch.linspace(1, 0, count + 1), noise
        for now, then in pairwise(sigmas):
            coefs = torch.tensor([[-now, 1, 0, 0, 0, 0, 1, 0, 0, then - now]])
            made = step(g, (33,), (0,), ("v_uncond", "last", "m1", "m2")) | {"coefs": coefs, "x": x}
            numbers = {n: made[n].float() for n in ("guidance", "jump_prob")}
            x, _, estimate, _ = flow_step(**(made | numbers | {"v_cond": noise - data}))
            torch.testing.assert_close(estimate, data, rtol=0, atol=1e-6)
        torch.testing.assert_close(x, data, rtol=0, atol=1e-6)


def test_linear_in_the_latents(backend):
    made = batch()
    twice = flow_step(**(made | {name: 2 * made[name] for name in LATENTS}))
    for a, b in zip(twice[:3], flow_step(**made)[:3], strict=True):
        assert torch.equal(a, 2 * b)


def coins_of(prob, seeds, steps, *lengths):
    count = len(seeds)
    numbers = torch.full((count,), prob), *(torch.tensor(each, dtype=torch.int64) for each in (seeds, steps))
    return jump_coins(*numbers, tiled(lengths), sum(lengths))


def test_coins_are_the_documented_ones(backend):
    """u < jump_prob, u from lane 0 of (step, COIN, place in the sample, 0)."""
    seeds, steps = [77, -(2**40) - 5], [3, 2**31 + 9]
    got = coins_of(0.4, seeds, steps, 9, 14)
    want = []
    for seed, index, length in zip(seeds, steps, (9, 14)):
        u = philox.uniform(philox.words(torch.tensor(seed), index, philox.COIN, torch.arange(length))[0])
        want.append(u < 0.4)
    assert got.dtype == torch.bool and torch.equal(got, torch.cat(want))


def test_coins_have_their_probability_and_their_own_names(backend):
    for prob in (0.0, 0.3, 1.0):
        coins = coins_of(prob, list(range(50)), [4] * 50, *[400] * 50).double()
        assert abs(float(coins.mean()) - prob) < 4 * (prob * (1 - prob) / 20_000) ** 0.5 + 1e-12
    base = coins_of(0.5, [1], [1], 200)
    assert not torch.equal(coins_of(0.5, [2], [1], 200), base)
    assert not torch.equal(coins_of(0.5, [1], [2], 200), base)
    assert not torch.equal(coins_of(0.5, [1 + (1 << 32)], [1], 200), base)
    assert torch.equal(coins_of(0.5, [1], [1], 300)[:200], base)
    assert len(coins_of(0.5, [], [])) == 0


def test_coins_outside_the_spans_say_stay(backend):
    coins = jump_coins(torch.ones(1), torch.tensor([1]), torch.tensor([1]), spans((2, 3)), 7)
    assert coins.tolist() == [False, False, True, True, True, False, False]


def test_coins_of_the_step_are_those_tossed_before(backend):
    made = batch()
    coins = jump_coins(*(made[n] for n in ("jump_prob", "seeds", "steps", "token_spans")), 12)
    unread = torch.where(coins, made["drawn"], -1)
    tokens = flow_step(**(made | {"drawn": unread}))[3]
    assert torch.equal(tokens, torch.where(coins, made["drawn"], made["tokens"]))


def test_coins_compile():
    made = batch()
    args = [made[n] for n in ("jump_prob", "seeds", "steps", "token_spans")]
    torch.compiler.reset()
    compiled = torch.compile(jump_coins, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args, 12), jump_coins(*args, 12))


def test_coins_refuse_what_the_step_refuses():
    made = batch()
    args = [made[n] for n in ("jump_prob", "seeds", "steps", "token_spans")]
    with pytest.raises(ValueError, match=r"^token_spans must lie in \[0, 11\), got"):
        jump_coins(*args, 11)
    with pytest.raises(ValueError, match=r"^seeds must be \(4,\) torch.int64, got"):
        jump_coins(args[0], args[1].int(), *args[2:], 12)

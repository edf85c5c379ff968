"""flow_noise and flow_source: the shared suite, the documented draws, and independence of neighbours."""

from __future__ import annotations

import math

import pytest
import torch
from harness import BF16, FP16, FP32, FP64, Case, ConstantOpSuite, Mistake, normal, spans

from uvg_engine.ops import flow_noise, flow_source
from uvg_engine.reference import philox

FLOATS = ("data", "sigma", "kappa")


def tiled(lengths, first=0):
    """Spans of these lengths one after another."""
    return spans(*((first + sum(lengths[:i]), length) for i, length in enumerate(lengths)))


def corruption(g, latents, texts, mask_id=-1, vocab=50, gap=0):
    """One sample per length; `gap` rows before and after the spans belong to nobody."""
    samples = len(latents)
    return {
        "data": normal(g, sum(latents) + 2 * gap),
        "tokens": torch.randint(vocab, (sum(texts) + 2 * gap,), generator=g),
        "sigma": torch.rand(samples, generator=g, dtype=FP64),
        "kappa": torch.rand(samples, generator=g, dtype=FP64),
        "seeds": torch.randint(-(2**62), 2**62, (samples,), generator=g),
        "step": 6,
        "latent_spans": tiled(latents, gap),
        "token_spans": tiled(texts, gap),
        "vocab": vocab,
        "mask_id": mask_id,
    }


def case(name, *args, **kwargs):
    return Case(name, lambda g: corruption(g, *args, **kwargs), FLOATS[1:], constant=FLOATS)


def one_sample(made, i):
    (a, n), (t, k) = made["latent_spans"][i].tolist(), made["token_spans"][i].tolist()
    cut = {name: made[name][i : i + 1] for name in ("sigma", "kappa", "seeds")}
    cut |= {"data": made["data"][a : a + n], "tokens": made["tokens"][t : t + k]}
    return made | cut | {"latent_spans": tiled([n]), "token_spans": tiled([k])}


class TestFlowNoise(ConstantOpSuite):
    op = "flow_noise"
    cases = (
        case("four-samples", (1, 0, 6, 17), (4, 9, 0, 5)),
        case("masked", (1, 0, 6, 17), (4, 9, 0, 5), mask_id=3),
        case("rows-of-nobody", (7, 5), (2, 6), gap=3),
        case("widest-vocabulary", (3,), (40,), vocab=2**31 - 1),
        case("one-word", (3,), (40,), vocab=1),
        case("no-latents", (0, 0), (3, 2)),
        case("no-tokens", (4, 1), (0, 0)),
        case("no-samples", (), ()),
        case("one-of-each", (1,), (1,)),
        case("many-samples", [(5 * i) % 17 for i in range(40)], [(3 * i) % 7 for i in range(40)]),
        case("block-and-one", (1025, 31), (257, 63)),
    )
    mistakes = (
        Mistake(r"data must be a floating-point \(N\)", {"data": lambda x: x[None]}),
        Mistake(r"data must be a floating-point \(N\)", {"data": lambda x: x.int()}),
        Mistake(r"tokens must be an int64 \(L\)", {"tokens": lambda t: t.int()}),
        Mistake(r"tokens must be an int64 \(L\)", {"tokens": lambda t: t[0]}),
        Mistake(r"tokens must be an int64 \(L\)", {"tokens": lambda t: t[None]}),
        Mistake(r"sigma must be \(4,\)", {"sigma": lambda s: s[1:]}),
        Mistake("sigma must be float32 or float64", {"sigma": lambda s: s.half()}),
        Mistake(r"kappa must be \(4,\)", {"kappa": lambda s: s[:, None]}),
        Mistake("kappa must be float32 or float64", {"kappa": lambda s: s.int()}),
        Mistake(r"seeds must be \(4,\) torch.int64", {"seeds": lambda s: s.int()}),
        Mistake(r"latent_spans must be an int32 \(S, 2\)", {"latent_spans": lambda s: s[0]}),
        Mistake(r"latent_spans must be an int32 \(S, 2\)", {"latent_spans": lambda s: s.long()}),
        Mistake(r"token_spans must be an int32 \(S, 2\)", {"token_spans": lambda s: s[:, :1]}),
        Mistake(r"token_spans must be \(4, 2\)", {"token_spans": lambda s: s[1:]}),
        Mistake(r"latent_spans must lie in \[0, 24\)", {"latent_spans": tiled((1, 0, 6, 18))}),
        Mistake(r"latent_spans must lie in \[0, 24\)", {"latent_spans": lambda s: s - 1}),
        Mistake(r"token_spans must lie in \[0, 18\)", {"token_spans": tiled((4, 9, 0, 6))}),
        Mistake("latent_spans must not overlap", {"latent_spans": spans((0, 1), (1, 0), (0, 6), (7, 17))}),
        Mistake("token_spans must not overlap", {"token_spans": spans((0, 4), (3, 9), (12, 0), (13, 5))}),
        Mistake(r"vocab must be in \[1, 2\^31\)", {"vocab": 0}),
        Mistake(r"vocab must be in \[1, 2\^31\)", {"vocab": 2**31}),
        Mistake(r"mask_id must be -1 or in \[0, vocab\)", {"mask_id": 50}),
        Mistake(r"mask_id must be -1 or in \[0, vocab\)", {"mask_id": -2}),
    )


def batch(dtype=FP32, mask_id=-1):
    return TestFlowNoise.cases[0 if mask_id == -1 else 1].inputs(dtype)


def quads(seed, step, count):
    """The documented normals of a sample: element i is lane i % 4 of (step, NOISE, i // 4, 0)."""
    words = philox.words(torch.tensor(seed), step, philox.NOISE, torch.arange(-(-count // 4)))
    return philox.normals(*words, dtype=FP64).flatten()[:count]


def test_matches_the_formula_per_sample():
    made = batch(FP64)
    x, velocity, noisy = flow_noise(**made)
    for i in range(4):
        (a, n), (t, k) = made["latent_spans"][i].tolist(), made["token_spans"][i].tolist()
        seed, sigma = int(made["seeds"][i]), made["sigma"][i]
        data, noise = made["data"][a : a + n], quads(seed, 6, n)
        torch.testing.assert_close(x[a : a + n], (1 - sigma) * data + sigma * noise)
        torch.testing.assert_close(velocity[a : a + n], noise - data)
        lanes = philox.words(torch.tensor(seed), 6, philox.SOURCE, torch.arange(k))
        kept = philox.uniform(lanes[0]) < made["kappa"][i]
        want = torch.where(kept, made["tokens"][t : t + k], (lanes[1] * 50) >> 32)
        assert torch.equal(noisy[t : t + k], want)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("mask_id", [-1, 3])
def test_samples_do_not_see_their_neighbours(backend, dtype, mask_id):
    made = batch(dtype, mask_id)
    alone = [flow_noise(**one_sample(made, i)) for i in range(4)]
    for got, parts in zip(flow_noise(**made), zip(*alone), strict=True):
        assert torch.equal(got, torch.cat(parts))


def test_samples_may_come_in_any_order(backend):
    made = batch()
    names = ("sigma", "kappa", "seeds", "latent_spans", "token_spans")
    turned = flow_noise(**(made | {n: made[n].flip(0) for n in names}))
    assert all(torch.equal(a, b) for a, b in zip(turned, flow_noise(**made), strict=True))


def test_rows_of_nobody_stay(backend):
    made = TestFlowNoise.cases[2].inputs(BF16)
    x, velocity, noisy = flow_noise(**made)
    idle = [0, 1, 2, -3, -2, -1]
    assert torch.equal(x[idle], made["data"][idle]) and not velocity[idle].any()
    assert torch.equal(noisy[idle], made["tokens"][idle])


@pytest.mark.parametrize("mask_id", [-1, 3])
def test_the_ends_of_the_path(backend, mask_id):
    """sigma 0 and kappa 1 keep the data, sigma 1 and kappa 0 are the source: flow_source, at step 0."""
    made = batch(mask_id=mask_id) | {"step": 0}
    zero, one = torch.zeros(4), torch.ones(4)
    x, _, noisy = flow_noise(**(made | {"sigma": zero, "kappa": one}))
    assert torch.equal(x, made["data"]) and torch.equal(noisy, made["tokens"])
    x, _, noisy = flow_noise(**(made | {"sigma": one, "kappa": zero}))
    names = ("seeds", "latent_spans", "token_spans")
    noise, source = flow_source(*(made[n] for n in names), 24, 18, 50, mask_id)
    assert torch.equal(x, noise) and torch.equal(noisy, source)
    assert noise.dtype == FP32 and source.dtype == torch.int64
    assert bool((source == 3).all()) if mask_id == 3 else len(source.unique()) > 5


def test_velocity_leads_from_the_data_to_the_noise(backend):
    made = batch()
    x, velocity, _ = flow_noise(**made)
    sigma = made["sigma"].repeat_interleave(made["latent_spans"][:, 1].long())
    torch.testing.assert_close(x - sigma * velocity, made["data"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x + (1 - sigma) * velocity, made["data"] + velocity, rtol=1e-5, atol=1e-5)


def test_source_noise_is_the_documented_one(backend):
    """Box and Muller may differ by fp32 rounding between backends, tokens may not."""
    noise, source = flow_source(torch.tensor([77, -5]), tiled((10, 6)), tiled((5, 3)), 16, 8, 1000)
    want = torch.cat([quads(77, 0, 10), quads(-5, 0, 6)])
    torch.testing.assert_close(noise.double(), want, rtol=1e-6, atol=1e-6)
    for seed, part in ((77, source[:5]), (-5, source[5:])):
        words = philox.words(torch.tensor(seed), 0, philox.SOURCE, torch.arange(len(part)))[1]
        assert torch.equal(part, (words * 1000) >> 32)


def test_each_part_of_a_name_changes_the_draws(backend):
    one = {n: v[:1] if n in ("sigma", "kappa", "seeds") else v for n, v in batch().items()}
    one |= {"latent_spans": tiled([24]), "token_spans": tiled([18]), "kappa": torch.zeros(1)}
    x, _, noisy = flow_noise(**one)
    for change in ({"step": 7}, {"seeds": one["seeds"] + 1}, {"seeds": one["seeds"] + (1 << 32)}):
        other, _, other_noisy = flow_noise(**(one | change))
        assert not torch.equal(other, x) and not torch.equal(other_noisy, noisy)


def test_noise_and_kept_tokens_have_their_distribution(backend):
    count = 40_000
    made = {"data": torch.zeros(count), "tokens": torch.full((count,), 6), "step": 1, "vocab": 5, "mask_id": -1}
    made |= {"sigma": torch.ones(1), "kappa": torch.tensor([0.3]), "seeds": torch.tensor([12345])}
    x, _, noisy = flow_noise(**made, latent_spans=tiled([count]), token_spans=tiled([count]))
    assert abs(float(x.mean())) < 4 / math.sqrt(count) and abs(float(x.var()) - 1) < 4 * math.sqrt(2 / count)
    share = torch.bincount(noisy, minlength=7).double() / count
    want = torch.tensor([0.14] * 5 + [0.0, 0.3], dtype=FP64)
    assert bool(((share - want).abs() <= 4 * (want * (1 - want) / count).sqrt()).all())


def test_source_compiles():
    args = (torch.tensor([77, -5]), tiled((10, 6)), tiled((5, 3)), 16, 8, 1000)
    torch.compiler.reset()
    compiled = torch.compile(flow_source, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*args), flow_source(*args), strict=True))


def test_source_refuses_what_the_noise_refuses():
    with pytest.raises(ValueError, match=r"^latent_spans must lie in \[0, 9\), got"):
        flow_source(torch.tensor([1]), tiled([10]), tiled([5]), 9, 5, 50)
    with pytest.raises(ValueError, match=r"^mask_id must be -1 or in \[0, vocab\), got 50"):
        flow_source(torch.tensor([1]), tiled([10]), tiled([5]), 10, 5, 50, 50)

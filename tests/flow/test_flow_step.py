"""The joint step and the corruption: garbage behind zero coefficients, neighbours, counters, awkward lengths."""

import pytest
import torch

from uvg_engine.ops import flow_noise, flow_source, flow_step, jump_coins
from uvg_engine.reference import philox
from uvg_engine.reference.flow_noise import latent_noise, source_tokens


def spans(*lengths):
    out, start = [], 0
    for length in lengths:
        out.append((start, length))
        start += length
    return torch.tensor(out, dtype=torch.int32).reshape(-1, 2)


def batch(latents=(7, 0, 13, 1), texts=(5, 4, 0, 3), dtype=torch.float32):
    gen = torch.Generator().manual_seed(1)
    n, length, b = sum(latents), sum(texts), len(latents)
    args = {
        name: torch.randn(n, generator=gen, dtype=dtype) for name in ("x", "v_cond", "v_uncond", "last", "m1", "m2")
    }
    args |= {"guidance": torch.tensor([5.0, 1.0, 3.0, 0.0])[:b], "coefs": torch.randn(b, 10, generator=gen)}
    args |= {"tokens": torch.arange(length), "drawn": 100 + torch.arange(length)}
    args |= {"jump_prob": torch.tensor([0.5, 0.3, 0.9, 1.0])[:b], "seeds": torch.tensor([3, -4, 2**40, 5])[:b]}
    args |= {"steps": torch.tensor([0, 7, 1, 2])[:b], "latent_spans": spans(*latents), "token_spans": spans(*texts)}
    return args


def one_sample(args, i):
    (a, n), (t, k) = args["latent_spans"][i].tolist(), args["token_spans"][i].tolist()
    cut = {name: v[a : a + n] for name, v in args.items() if name in ("x", "v_cond", "v_uncond", "last", "m1", "m2")}
    cut |= {name: args[name][t : t + k] for name in ("tokens", "drawn")}
    cut |= {name: args[name][i : i + 1] for name in ("guidance", "coefs", "jump_prob", "seeds", "steps")}
    return cut | {"latent_spans": spans(n), "token_spans": spans(k)}


def test_matches_the_formula_per_sample():
    args = batch(dtype=torch.float64)
    x_next, xc, m, tokens = flow_step(**args)
    for i, (a, n) in enumerate(args["latent_spans"].tolist()):
        s = slice(a, a + n)
        c, g = args["coefs"][i].double(), args["guidance"][i].double()
        x, vc, vu, last, m1, m2 = (args[k][s] for k in ("x", "v_cond", "v_uncond", "last", "m1", "m2"))
        v = vu + g * (vc - vu)
        want_m = x + c[0] * v
        want_xc = c[1] * x + c[2] * last + c[3] * want_m + c[4] * m1 + c[5] * m2
        torch.testing.assert_close(m[s], want_m)
        torch.testing.assert_close(xc[s], want_xc)
        torch.testing.assert_close(x_next[s], c[6] * want_xc + c[7] * want_m + c[8] * m1 + c[9] * v)
    coins = jump_coins(args["jump_prob"], args["seeds"], args["steps"], args["token_spans"], 12)
    assert torch.equal(tokens, torch.where(coins, args["drawn"], args["tokens"]))
    assert coins[-3:].all() and 0 < coins.sum() < len(coins)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_of_four_equals_four_batches_bitwise(dtype):
    args = batch(dtype=dtype)
    together = flow_step(**args)
    alone = [flow_step(**one_sample(args, i)) for i in range(4)]
    for k in range(4):
        assert together[k].dtype == args["x" if k < 3 else "tokens"].dtype
        assert torch.equal(together[k], torch.cat([out[k] for out in alone]))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), None])
def test_zero_coefficients_let_nothing_through(garbage):
    args = batch()
    args["coefs"] = torch.tensor([[0, 1, 0, 0, 0, 0, 1, 0, 0, -0.1]]).repeat(4, 1)
    clean = flow_step(**args)
    for name in ("last", "m1", "m2"):
        args[name] = None if garbage is None else torch.full_like(args[name], garbage)
    for a, b in zip(clean, flow_step(**args), strict=True):
        assert torch.equal(a, b)


def test_hold_and_unguided_rows_ignore_garbage_velocities():
    args = batch()
    args["guidance"] = torch.ones(4)
    want = flow_step(**(args | {"v_uncond": None}))
    assert torch.equal(flow_step(**(args | {"v_uncond": torch.full_like(args["x"], float("nan"))}))[0], want[0])
    hold = args | {"coefs": torch.tensor([[0.0, 1, 0, 0, 0, 0, 1, 0, 0, 0]]).repeat(4, 1), "jump_prob": torch.zeros(4)}
    hold["v_cond"] = torch.full_like(args["x"], float("nan"))
    assert torch.equal(flow_step(**hold)[0], args["x"]) and torch.equal(flow_step(**hold)[3], args["tokens"])


def test_asking_for_absent_history_is_an_error():
    for name in ("last", "m1", "m2"):
        with pytest.raises(ValueError, match=f"{name} must be given"):
            flow_step(**(batch() | {name: None}))


def test_empty_streams():
    out = flow_step(**batch((0, 0), (3, 2)))
    assert out[0].numel() == 0 and len(out[3]) == 5
    out = flow_step(**batch((4, 1), (0, 0)))
    assert len(out[0]) == 5 and out[3].numel() == 0
    assert len(jump_coins(torch.zeros(0), *[torch.zeros(0, dtype=torch.int64)] * 2, spans(), 0)) == 0


@pytest.mark.parametrize("mask_id", [-1, 3])
def test_flow_noise_of_each_sample_alone_bitwise(mask_id):
    latent, text = spans(1, 0, 6, 17), spans(4, 9, 0, 5)
    data, tokens = torch.randn(24, generator=torch.Generator().manual_seed(0)), torch.arange(18)
    sigma, kappa = torch.tensor([0.2, 0.5, 1.0, 0.0]), torch.tensor([0.5, 0.0, 0.3, 1.0])
    seeds = torch.tensor([1, 2, -3, 2**50])
    x, v, noisy = flow_noise(data, tokens, sigma, kappa, seeds, 6, latent, text, 50, mask_id)
    for i in range(4):
        (a, n), (t, k) = latent[i].tolist(), text[i].tolist()
        one = flow_noise(
            data[a : a + n],
            tokens[t : t + k],
            sigma[i : i + 1],
            kappa[i : i + 1],
            seeds[i : i + 1],
            6,
            spans(n),
            spans(k),
            50,
            mask_id,
        )
        for got, want in zip((x[a : a + n], v[a : a + n], noisy[t : t + k]), one, strict=True):
            assert torch.equal(got, want)
    assert torch.equal(x[7:], data[7:]) and torch.equal(noisy[13:], tokens[13:])  # sigma 0 and kappa 1 keep the data
    noise = latent_noise(seeds, latent, 24, step=6)
    assert torch.equal(x[1:7], noise[1:7])  # sigma 1 is the noise
    assert torch.equal(noisy[4:13], source_tokens(seeds, text, 18, 50, mask_id, step=6)[4:13])  # kappa 0 the source


def test_noise_counters_are_the_documented_ones():
    seed, drawn = torch.tensor([77]), latent_noise(torch.tensor([77]), spans(10), 10, step=2)
    quad = philox.normals(*philox.words(seed, 2, philox.NOISE, torch.tensor([1])))
    assert torch.equal(drawn[4:8], quad[0])
    tokens = source_tokens(seed, spans(5), 5, 1000, step=2)
    word = philox.words(seed, 2, philox.SOURCE, torch.tensor([3]))[1]
    assert int(tokens[3]) == (int(word) * 1000) >> 32
    x, source = flow_source(seed, spans(10), spans(5), 10, 5, 1000)
    assert torch.equal(x, latent_noise(seed, spans(10), 10)) and torch.equal(
        source, source_tokens(seed, spans(5), 5, 1000)
    )


def noise_args(n=9, length=5):
    two = torch.tensor([0.25, 1.0])
    args = (torch.randn(n), torch.arange(length), two, two, torch.tensor([1, 2]), 3)
    return [*args, spans(n, 0), spans(2, length - 2), 50, -1]


@pytest.mark.parametrize("place, value, match", [
    (0, torch.zeros(2, 2), r"data must be floating-point \(N,\)"),
    (1, torch.zeros(5), "tokens must be int64"),
    (2, torch.zeros(3), r"sigma must be \(2,\)"),
    (4, torch.zeros(2), "seeds must be int64"),
    (6, torch.zeros(2, 2), "latent_spans must be"),
    (6, spans(9, 1), "spans must lie in"),
    (7, spans(5), "token_spans must have 2 rows"),
    (9, 50, "mask_id must be -1 or in"),
])  # fmt: skip
def test_flow_noise_refuses(place, value, match):
    args = noise_args()
    args[place] = value
    with pytest.raises(ValueError, match=match):
        flow_noise(*args)


@pytest.mark.parametrize("change, match", [
    ({"m1": torch.zeros(3)}, "m1 must be"),
    ({"coefs": torch.zeros(4, 9)}, r"coefs must be \(4, 10\)"),
    ({"drawn": torch.zeros(12)}, "drawn must be int64"),
    ({"steps": torch.zeros(4, dtype=torch.int32)}, "steps must be int64"),
])  # fmt: skip
def test_flow_step_refuses(change, match):
    with pytest.raises(ValueError, match=match):
        flow_step(**(batch() | change))


@pytest.mark.parametrize("n, length", [(0, 3), (9, 2), (1, 5)])
def test_opcheck_and_fullgraph(n, length):
    torch.library.opcheck(torch.ops.uvg.flow_noise.default, noise_args(n, length))
    args = batch((n, 3), (length, 1))
    names = "x v_cond v_uncond guidance coefs last m1 m2 latent_spans tokens drawn jump_prob seeds steps token_spans"
    step_args = [args[name] for name in names.split()]
    torch.library.opcheck(torch.ops.uvg.flow_step.default, step_args)
    compiled = torch.compile(
        lambda *a: (flow_step(*a), jump_coins(*a[-4:], len(a[9]))), fullgraph=True, backend="aot_eager"
    )
    (got, coins), want = compiled(*step_args), flow_step(*step_args)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(torch.where(coins, step_args[10], step_args[9]), want[3])
    noised = noise_args(n, length)
    got = torch.compile(flow_noise, fullgraph=True, backend="aot_eager")(*noised)
    assert all(torch.equal(a, b) for a, b in zip(got, flow_noise(*noised), strict=True))

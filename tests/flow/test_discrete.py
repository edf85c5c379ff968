"""The discrete sampler against exact distributions on a vocabulary of 3 and two tokens, with the perfect model."""

import itertools

import pytest
import torch

from uvg_engine.flow import FlowSettings, Kappa, MixturePath, plan, step_marginal, transition_rows
from uvg_engine.ops import flow_noise, flow_source, flow_step, jump_coins
from uvg_engine.reference import philox

VOCAB, LENGTH, REQUESTS = 3, 2, 20_000
DATA = torch.tensor([[0.30, 0.02, 0.08], [0.05, 0.25, 0.05], [0.02, 0.03, 0.20]], dtype=torch.float64)
# chi-square bounds at p = 1e-3 by degrees of freedom. Every draw is seeded, so a pass is a pass for good
BOUND = {8: 26.12}
PATHS = [MixturePath(VOCAB, Kappa(n), mask) for n in (1.0, 2.0) for mask in (-1, 1)]
NO_LATENTS = torch.zeros(REQUESTS, 2, dtype=torch.int32)
TOKEN_SPANS = torch.stack([torch.arange(REQUESTS) * LENGTH, torch.full((REQUESTS,), LENGTH)], 1).int()
SEEDS = torch.arange(REQUESTS) * 7919 + 5


def chi_square(tokens, expected):
    states = (tokens.reshape(-1, LENGTH) * torch.tensor([VOCAB, 1])).sum(1)
    seen = torch.bincount(states, minlength=VOCAB**LENGTH).double()
    want = expected.flatten() * len(states)
    assert seen[want < 1e-9].sum() == 0
    return float(((seen - want) ** 2 / want.clamp_min(1e-9)).sum())


def draw(probs, step):
    """Inverse CDF with the DRAW stream's uniform of (seed, step, place)."""
    seeds, place = SEEDS.repeat_interleave(LENGTH), torch.arange(LENGTH).repeat(REQUESTS)
    u = philox.uniform(philox.words(seeds, step, philox.DRAW, place)[0], torch.float64)
    return (probs.cumsum(-1)[:, :-1] < u[:, None]).sum(-1)


def model(path, tokens, step):
    table = path.posterior(DATA, 1 - step.text_time / 1000)
    pair = tokens.reshape(-1, LENGTH)
    return table[pair[:, 0], pair[:, 1]].flatten(0, 1)


def sample(path, job, lazy):
    _, tokens = flow_source(SEEDS, NO_LATENTS, TOKEN_SPANS, 0, REQUESTS * LENGTH, VOCAB, path.mask_id)
    none, idle = torch.zeros(0), torch.zeros(REQUESTS, 10)
    evaluated = 0
    for step in job.steps:
        prob = torch.full((REQUESTS,), step.jump_prob)
        index = torch.full((REQUESTS,), step.index)
        probs = model(path, tokens, step)
        picked = probs.argmax(-1) if step.argmax else draw(probs, step.index)
        if lazy:
            coins = jump_coins(prob, SEEDS, index, TOKEN_SPANS, len(tokens))
            picked = torch.where(coins, picked, -99)  # what is not drawn must not be read
            evaluated += int(coins.sum())
        tokens = flow_step(
            none,
            none,
            None,
            idle[:, 0],
            idle,
            None,
            None,
            None,
            NO_LATENTS,
            tokens,
            picked,
            prob,
            SEEDS,
            index,
            TOKEN_SPANS,
        )[3]
    return tokens, evaluated / len(tokens)


def exact(path, job):
    """The sampler's own distribution, step by step."""
    out = torch.einsum("a,b->ab", path.source(), path.source())
    for step in job.steps:
        rows = path.posterior(DATA, 1 - step.text_time / 1000)
        if step.argmax:
            rows = torch.nn.functional.one_hot(rows.argmax(-1), VOCAB).double()
        out = step_marginal(out, rows, step.jump_prob)
    return out


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("rule", ["euler", "exact", "progress"])
def test_sampler_has_its_exact_distribution(path, rule):
    job = plan("caption", FlowSettings(steps=5, text_rule=rule, kappa_power=path.kappa.power))
    first, _ = sample(path, job, lazy=False)
    assert chi_square(first, exact(path, job)) < BOUND[8]
    lazy, evaluations = sample(path, job, lazy=True)
    assert torch.equal(lazy, first)  # coin first: same draws, hence the same distribution
    assert evaluations == pytest.approx(job.head_evaluations, rel=0.01)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_more_steps_come_to_the_data(path):
    """The error (total variation) falls like 1/N under the exact rule, like log(N)/N under euler's, whose is larger."""
    off = {}
    for rule in ("euler", "exact"):
        for steps in (16, 256):
            job = plan("caption", FlowSettings(steps=steps, text_rule=rule, kappa_power=path.kappa.power))
            end = exact(path, job)
            assert float(end.sum()) == pytest.approx(1)
            off[rule, steps] = float((end - DATA).abs().sum() / 2)
    assert off["exact", 16] / off["exact", 256] > 15 and off["euler", 16] / off["euler", 256] > 16 / 3
    assert off["exact", 16] < off["euler", 16] < 0.1 and 3 * off["exact", 256] < off["euler", 256]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_one_token_follows_the_path_exactly(path):
    """With one token and the exact rule every intermediate marginal is the path's, whatever the steps."""
    data = DATA.sum(1)
    now, times = path.source(), [0.0, 0.2, 0.3, 0.9, 1.0]
    for t, t_next in itertools.pairwise(times):
        now = step_marginal(now, path.posterior(data, t), path.kappa.jump_probability(t, t_next, "exact"))
        torch.testing.assert_close(now, path.marginal(data, t_next), rtol=0, atol=1e-12)
    torch.testing.assert_close(now, data)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_rows_sum_to_one(path, t):
    posterior = path.posterior(DATA, t)
    one = torch.ones((), dtype=torch.float64)
    assert posterior.shape == (VOCAB, VOCAB, LENGTH, VOCAB) and bool((posterior >= 0).all())
    torch.testing.assert_close(posterior.sum(-1), one.expand(VOCAB, VOCAB, LENGTH))
    torch.testing.assert_close(path.token_rows(t).sum(-1), one.expand(VOCAB))
    torch.testing.assert_close(path.marginal(DATA, t).sum(), one)
    tokens = torch.arange(VOCAB)
    for jump in (0.0, 0.4, 1.0):
        rows = transition_rows(tokens, posterior[0, 0, 0].expand(VOCAB, VOCAB), jump)
        torch.testing.assert_close(rows.sum(-1), one.expand(VOCAB))
        assert bool((rows >= 0).all())
    # Bayes on the whole: averaging the posterior over p_t returns the data's own marginal
    torch.testing.assert_close((path.marginal(DATA, t)[..., None] * posterior[:, :, 0]).sum((0, 1)), DATA.sum(1))


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_corruption_follows_the_path(path):
    states = torch.multinomial(DATA.flatten(), REQUESTS, True, generator=torch.Generator().manual_seed(3))
    tokens = torch.stack([states // VOCAB, states % VOCAB], 1).flatten()
    kappa = path.kappa(torch.full((REQUESTS,), 0.6))
    _, _, noisy = flow_noise(
        torch.zeros(0), tokens, 0 * kappa, kappa, SEEDS, 1, NO_LATENTS, TOKEN_SPANS, VOCAB, path.mask_id
    )
    assert chi_square(noisy, path.marginal(DATA, 0.6)) < BOUND[8]


def test_jumps_do_not_depend_on_the_batch():
    prob, index = torch.full((REQUESTS,), 0.3), torch.full((REQUESTS,), 4)
    coins = jump_coins(prob, SEEDS, index, TOKEN_SPANS, REQUESTS * LENGTH)
    for b in (0, 1, 777, REQUESTS - 1):
        alone = jump_coins(prob[:1], SEEDS[b : b + 1], index[:1], TOKEN_SPANS[:1], LENGTH)
        assert torch.equal(alone, coins[b * LENGTH : (b + 1) * LENGTH])
    assert float(coins.double().mean()) == pytest.approx(0.3, abs=0.01)


def test_path_errors():
    with pytest.raises(ValueError, match="mask_id must be -1 or in"):
        MixturePath(3, mask_id=3)
    with pytest.raises(ValueError, match="vocab must be at least 1, got 0"):
        MixturePath(0)

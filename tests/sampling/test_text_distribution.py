"""The text that the engine writes has the distribution that the model's own logits imply: chi-square, seeded."""

import pytest
import torch
from scipy import stats
from tiny import make_engine, make_model

from uvg_engine.flow import FlowSettings, MixturePath, plan, step_marginal
from uvg_engine.media import WordTokenizer
from uvg_engine.sampling import Request

VOCAB = 6
VIDEO = torch.full((2, 8, 8, 3), 200, dtype=torch.uint8)  # one patch


def engine_for(length, source, temperature=1.0, coupled=False):
    """Six words. Coupled: tokens hang on each other. Else not, and each token of a caption is a draw of its own."""
    model = make_model(1 if coupled else 0, vocab=VOCAB, layers=1)
    attention = model.blocks[0].attn1
    with torch.no_grad():
        model.text_head.linear.weight.mul_(2 if coupled else 3)
        model.vocab_embed.weight.mul_(1 if coupled else 3)
        attention.to_v.weight.mul_(4)
        attention.to_out[0].weight.mul_(4 if coupled else 0)
    size = {"frames": 2, "height": 8, "width": 8, "text_length": length}
    defaults = {**size, "source": source, "temperature": temperature}
    return make_engine(model, tokenizer=WordTokenizer(["one", "two"]), defaults=defaults)


@torch.no_grad()
def model_rows(engine, states, time):
    """p(word | state) of every token, by the dense call: [states, L, V]."""
    latent, null = engine.codec.encode(VIDEO)[None], engine.text_encoder.null()[None]
    count = len(states)
    times = torch.zeros(count), torch.full((count,), time)
    logits = engine.model(latent.expand(count, -1, -1, -1, -1), states, *times, null)[1]
    return (logits.double() / engine.defaults.temperature).softmax(-1)


def exact(engine, job, length):
    """The distribution of whole texts after the job's steps, [V] * length."""
    path = MixturePath(VOCAB, mask_id=engine.mask_id)
    states = torch.cartesian_prod(*[torch.arange(VOCAB)] * length).reshape(-1, length)
    out = path.source()[states].prod(-1).view([VOCAB] * length)
    for step in job.steps:
        rows = model_rows(engine, states, step.text_time)
        if step.argmax:
            rows = torch.nn.functional.one_hot(rows.argmax(-1), VOCAB).double()
        out = step_marginal(out, rows.view(*[VOCAB] * length, length, VOCAB), step.jump_prob)
    return out


def captions(engine, count, rule, steps):
    how = {"num_steps": steps, "text_rule": rule}
    results = engine.run(Request("caption", video=VIDEO, seed=1000 + i, **how) for i in range(count))
    return torch.tensor([result.tokens for result in results])


def p_value(seen, want):
    """Of the counts under the distribution; outcomes expected fewer than five times are counted as one."""
    expected = want * seen.sum()
    likely = expected >= 5
    counts, expected = (torch.cat([x[likely], x[~likely].sum()[None]]) for x in (seen.double(), expected))
    if counts[-1] and expected[-1] < 1e-9:
        return 0.0  # what cannot be was seen
    keep = expected > 1e-9
    return float(stats.chisquare(counts[keep].numpy(), expected[keep].numpy()).pvalue)


def job(rule, steps):
    return plan("caption", FlowSettings(steps=steps, text_rule=rule))


@pytest.mark.parametrize("source, temperature", [("uniform", 1.0), ("mask", 0.6)])
@pytest.mark.parametrize("rule", ["euler", "exact", "progress"])
def test_words(source, rule, temperature):
    length = 128
    engine = engine_for(length, source, temperature)
    tokens = captions(engine, 24, rule, 2)
    seen = torch.bincount(tokens.flatten(), minlength=VOCAB)
    assert p_value(seen, exact(engine, job(rule, 2), 1)) > 1e-3
    other = engine_for(length, "mask" if source == "uniform" else "uniform", temperature)
    assert p_value(seen, exact(other, job(rule, 2), 1)) < 1e-6, "another source would not pass"
    if source == "mask":
        for wrong in {"euler", "exact", "progress"} - {rule}:
            assert p_value(seen, exact(engine, job(wrong, 2), 1)) < 1e-6, "another rule would not pass"


@pytest.mark.parametrize("source, rule", [("uniform", "exact"), ("mask", "euler")])
def test_pairs_of_words_that_see_each_other(source, rule):
    engine = engine_for(2, source, coupled=True)
    want = exact(engine, job(rule, 3), 2)
    tokens = captions(engine, 200, rule, 3)
    seen = torch.bincount(tokens @ torch.tensor([VOCAB, 1]), minlength=VOCAB**2)
    assert p_value(seen, want.flatten()) > 1e-3
    apart = want.sum(1)[:, None] * want.sum(0)
    assert p_value(seen, apart.flatten()) < 1e-6, "words drawn apart from each other would not pass"

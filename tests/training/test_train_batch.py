"""A training batch: a function of (seed, position), with the shares, times and corruption that the file asks for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny_run import stage, tiny

from uvg_engine.media.codec import PixelCodec
from uvg_engine.media.text_encoder import HashTextEncoder
from uvg_engine.media.tokenizer import WordTokenizer
from uvg_engine.model.config import UniViGUConfig
from uvg_engine.training.batch import Pieces, make_batch
from uvg_engine.training.pieces import data_order

PROMPT, CAPTION = "a red seven", "a red seven starts at the left and ends at the right"
LENGTH = 16  # of the padded text
MANY = 4000
UNLIKELY = 1e-3  # what a right implementation would miss once in a thousand seeds; the seed is fixed
MODEL = UniViGUConfig(
    heads=1, head_dim=4, in_channels=3, text_dim=4, freq_dim=4, ffn_dim=4, layers=1, vocab=32, patch=(1, 1, 1)
)
PIECES = Pieces(PixelCodec((2, 4, 4), (1, 1, 1)), WordTokenizer.from_texts([CAPTION]), HashTextEncoder(4, 8))


def batch_of(positions, text="prompt", seed=0, shares=None, **changes):
    """A batch of one-cell videos whose prompts and captions are all the same."""
    config = tiny(stage("only", text, **(shares or {})), text_length=LENGTH, seed=seed, **changes)
    frames = torch.full((len(positions), 2, 4, 4, 3), 200, dtype=torch.uint8)
    samples = {"frames": frames, "prompts": [PROMPT] * len(positions), "captions": [CAPTION] * len(positions)}
    return make_batch(samples, positions, config.stages[0], config, MODEL, PIECES, 0)


@pytest.fixture(scope="module")
def many():
    return batch_of(range(MANY), shares={"generate": 0.3, "caption": 0.35, "same_time": 0.15, "condition_dropout": 0.2})


def corners(batch):
    """Which samples are generate, caption, same time and independent, from what the model gets to see."""
    generate, caption = batch.time_t == 0, batch.time_v == 0
    same = ~generate & ~caption & torch.isclose(batch.time_t, batch.time_v, rtol=0, atol=1e-3)
    return generate, caption, same, ~(generate | caption | same)


def null_condition(batch):
    return torch.tensor([not rows.any() for rows in batch.cond.split(batch.layout.cond_lens)])


def test_shares_of_the_corners(many):
    counts = [int(where.sum()) for where in corners(many)]
    assert sum(counts) == MANY
    assert stats.chisquare(counts, [MANY * share for share in (0.3, 0.35, 0.15, 0.2)]).pvalue > UNLIKELY


def test_share_of_dropped_conditions(many):
    generate, caption, *_ = corners(many)
    null = null_condition(many)
    assert null[caption].all(), "captioning never sees the prompt"
    for where in (generate, ~generate & ~caption):
        dropped, count = int(null[where].sum()), int(where.sum())
        assert stats.binomtest(dropped, count, 0.2).pvalue > UNLIKELY


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_dropout_can_be_all_or_nothing(dropout, share):
    batch = batch_of(range(50), shares={"caption": 0.0, "condition_dropout": dropout})
    assert null_condition(batch).float().mean() == share


def test_times_have_the_asked_distribution():
    batch = batch_of(range(MANY), shares={"generate": 0.2, "caption": 0.2}, times={"video_mean": 0.5, "video_std": 1.3})
    generate, caption, _, independent = corners(batch)
    logits = torch.logit(batch.time_v[~caption].double() / 1000)
    assert stats.kstest((logits - 0.5) / 1.3, "norm").pvalue > UNLIKELY
    free = ~generate & independent | caption
    assert stats.kstest(1 - batch.time_t[free] / 1000, "uniform").pvalue > UNLIKELY
    together = torch.stack([batch.time_v[independent], batch.time_t[independent]])
    assert abs(torch.corrcoef(together)[0, 1]) < 4 / int(independent.sum()) ** 0.5


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("source", ["mask", "uniform"])
def test_tokens_are_kept_with_probability_kappa(source, power):
    shares = {"generate": 0.0, "caption": 1.0, "same_time": 0.0}
    batch = batch_of(range(500), shares=shares, source=source, times={"text_power": power})
    kappa = (1 - batch.time_t.double() / 1000) ** power
    kappa = kappa.repeat_interleave(LENGTH)
    noise = batch.tokens != batch.targets
    if source == "mask":
        assert (batch.tokens[noise] == PIECES.tokenizer.mask_id).all()
        expected, spread = 1 - kappa, kappa * (1 - kappa)
    else:  # the source may draw the right token
        expected = (1 - kappa) * (1 - 1 / MODEL.vocab)
        spread = expected * (1 - expected)
    assert abs(noise.sum() - expected.sum()) < 4 * spread.sum().sqrt()
    slope = power * (kappa ** (1 / power)) ** (power - 1) / (1 - kappa)
    inner = (kappa > 0.01) & (kappa < 0.99)
    torch.testing.assert_close(batch.rate[inner].double(), slope[inner], rtol=1e-3, atol=0)
    assert batch.rate.isfinite().all()


def test_video_is_a_mix_of_data_and_noise(many):
    sigma = (many.time_v / 1000).repeat_interleave(3)
    clean = PIECES.codec.encode_batch(torch.full((1, 2, 4, 4, 3), 200, dtype=torch.uint8)).flatten().repeat(MANY)
    torch.testing.assert_close(many.latents - sigma * many.velocity, clean, rtol=0, atol=1e-5)
    caption = corners(many)[1].repeat_interleave(3)
    assert torch.equal(many.latents[caption], clean[caption])
    assert stats.kstest(many.velocity + clean, "norm", method="asymp").pvalue > UNLIKELY
    assert torch.equal(many.video_weight, (~caption).float())


@pytest.mark.parametrize(("text", "learned"), [("prompt", PROMPT), ("caption", CAPTION)])
def test_text_is_the_stage_s_target_and_the_clean_prompt_where_it_generates(text, learned):
    batch = batch_of(range(200), text)
    generate = corners(batch)[0].tolist()
    prompt, target = PIECES.tokenizer.encode(PROMPT), PIECES.tokenizer.encode(learned, LENGTH)
    rows = zip(*(x.split(batch.layout.text_lens) for x in (batch.targets, batch.tokens, batch.text_weight)))
    assert 0 < sum(generate) < 200
    for is_generate, (targets, tokens, weight) in zip(generate, rows, strict=True):
        assert targets.tolist() == (prompt if is_generate else target)
        assert (weight == (not is_generate)).all()
        assert not is_generate or torch.equal(tokens, targets)


def test_a_stage_without_text_has_none():
    batch = batch_of(range(20), "none", shares={"condition_dropout": 0.5})
    assert batch.layout.num_text == 0 and batch.tokens.numel() == 0
    assert (batch.video_weight == 1).all() and (batch.time_v > 0).all()
    assert 0 < null_condition(batch).sum() < 20


def per_sample(batch):
    """What each sample of a batch consists of."""
    lens, conds = batch.layout.text_lens, batch.layout.cond_lens
    parts = [batch.latents.view(-1, 3), batch.velocity.view(-1, 3), batch.time_v, batch.time_t]
    parts += [x.split(lens) for x in (batch.tokens, batch.targets, batch.rate, batch.text_weight)]
    return list(zip(*parts, batch.cond.split(conds), strict=True))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6, unique=True), st.integers(0, 2**31 - 1))
def test_a_sample_depends_on_seed_and_position_alone(positions, seed):
    together = per_sample(batch_of(positions, "caption", seed))
    for position, sample in zip(positions, together, strict=True):
        (alone,) = per_sample(batch_of([position], "caption", seed))
        assert all(torch.equal(a, b) for a, b in zip(sample, alone, strict=True))


def test_seeds_and_positions_differ():
    one, two = batch_of(range(50), seed=1), batch_of(range(50), seed=2)
    velocities = torch.cat([one.velocity.view(-1, 3), two.velocity.view(-1, 3)])
    assert len(torch.unique(velocities, dim=0)) == 100


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**31 - 1), st.integers(0, 1000))
def test_the_data_order_visits_everything_once_an_epoch(size, seed, epoch):
    places = range(epoch * size, (epoch + 1) * size)
    assert sorted(data_order(place, size, seed) for place in places) == list(range(size))


def test_epochs_and_seeds_have_their_own_order():
    orders = {tuple(data_order(p, 50, seed) for p in range(e * 50, e * 50 + 50)) for seed in range(3) for e in range(3)}
    assert len(orders) == 9

"""The loss against one written down by hand in fp64, sample by sample, from the model's own outputs."""

import dataclasses

import pytest
import torch
from tiny_run import stage, tiny

from uvg_engine.model.univigu import UniViGU
from uvg_engine.training.batch import make_batch
from uvg_engine.training.losses import compute_losses, noisy_counts
from uvg_engine.training.pieces import make_dataset, make_pieces, model_config

SIZE = 12


@dataclasses.dataclass
class Setting:
    model: UniViGU
    batch: object
    stage: object


def setting(text="caption", loss="ce", source="mask", part=range(SIZE), **shares):
    """A model with heads that are not zero, and one batch of the positions `part` for it."""
    config = tiny(stage("only", text, **shares), loss=loss, source=source, times={"text_power": 2.0})
    dataset = make_dataset(config)
    pieces = make_pieces(config, dataset)
    torch.manual_seed(0)
    model = UniViGU(model_config(config, pieces))
    for head in (model.text_head.linear, model.video_head.proj_out):
        torch.nn.init.normal_(head.weight, std=0.3)
    positions = part
    batch = make_batch(dataset.batch(positions), positions, config.stages[0], config, model.config, pieces, 0)
    return Setting(model, batch, config.stages[0])


@torch.no_grad()
def by_hand(s, loss):
    """(sum of squared video errors, their number, sum of token losses, their number), in fp64."""
    batch, layout = s.batch, s.batch.layout
    condition = s.model.condition_kv(batch.cond, layout.cond_lens)
    out = s.model.packed(batch.latents, batch.tokens, layout, batch.time_v, batch.time_t, condition)
    video = [0.0, 0]
    for index, cells in enumerate((out.velocity.double() - batch.velocity.double()).view(layout.num_samples, -1)):
        if batch.time_v[index] > 0:  # noisy video
            video = [video[0] + float((cells**2).sum()), video[1] + len(cells)]
    text = [0.0, 0]
    if out.text_hidden is None:
        return *video, *text
    head = s.model.text_head.linear
    p = (out.text_hidden.double() @ head.weight.double().T + head.bias.double()).softmax(-1)
    first = 0
    for index, length in enumerate(layout.text_lens):
        time = 1 - float(batch.time_t[index]) / 1000
        for row in range(first, first + length) if batch.time_t[index] > 0 else ():  # noisy text
            target, current = int(batch.targets[row]), int(batch.tokens[row])
            if loss == "ce":
                token = -p[row, target].log()
            else:
                rate = 2 * time / (1 - time**2)  # kappa = t^2
                stays = float(target == current)
                token = -rate * (p[row, current] - stays + (1 - stays) * p[row, target].log())
            text = [text[0] + float(token), text[1] + 1]
        first += length
    return *video, *text


@pytest.mark.parametrize("source", ["mask", "uniform"])
@pytest.mark.parametrize("loss", ["ce", "gkl"])
def test_both_means_and_their_balance(loss, source):
    s = setting(loss=loss, source=source, lambda_v=0.7, lambda_t=1.9)
    video_sum, video_count, text_sum, text_count = by_hand(s, loss)
    assert min(video_count, text_count) > 0
    got = compute_losses(s.model, s.batch, s.stage, loss)
    rtol = 1e-5 if loss == "ce" else 1e-4  # the rate near t = 1 comes from times rounded to fp32
    assert got.video.item() == pytest.approx(video_sum / video_count, rel=1e-5)
    assert got.text.item() == pytest.approx(text_sum / text_count, rel=rtol)
    # DESIGN 5: lambda_t = video tokens / text tokens on sums; the stage's factors stand on top of that
    balanced = (0.7 * video_sum + 1.9 * video_count / text_count * text_sum) / video_count
    assert got.total.item() == pytest.approx(balanced, rel=rtol)
    assert got.total.requires_grad and not got.video.requires_grad


@pytest.mark.parametrize(
    ("text", "shares", "has_video", "has_text"),
    [
        ("none", {}, True, False),
        ("prompt", {"generate": 1.0, "caption": 0.0, "same_time": 0.0}, True, False),
        ("prompt", {"generate": 0.0, "caption": 1.0, "same_time": 0.0}, False, True),
        ("prompt", {"generate": 0.0, "caption": 0.0, "same_time": 1.0}, True, True),
    ],
)
def test_a_stream_that_is_clean_everywhere_has_no_loss(text, shares, has_video, has_text):
    s = setting(text, **shares)
    got = compute_losses(s.model, s.batch, s.stage)
    assert (not got.video.isnan(), not got.text.isnan()) == (has_video, has_text)
    parts = [x for x, there in ((got.video, has_video), (got.text, has_text)) if there]
    torch.testing.assert_close(got.total.detach(), sum(parts))
    got.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in s.model.parameters())


def test_clean_streams_teach_nothing():
    s = setting(loss="ce")
    clean_video = s.batch.video_weight == 0
    clean_text = s.batch.text_weight == 0
    assert clean_video.any() and clean_text.any()
    moved = dataclasses.replace(
        s.batch,
        velocity=torch.where(clean_video, s.batch.velocity + 100, s.batch.velocity),
        targets=torch.where(clean_text, 0, s.batch.targets),
    )
    one, two = (compute_losses(s.model, batch, s.stage).total for batch in (s.batch, moved))
    assert torch.equal(one, two)


def test_parts_of_a_step_add_up_to_the_whole():
    s = setting()
    counts = noisy_counts(s.batch)
    parts = [compute_losses(s.model, setting(part=[i]).batch, s.stage, counts=counts) for i in range(SIZE)]
    got = compute_losses(s.model, s.batch, s.stage)
    for name in ("total", "video", "text"):
        assert sum(getattr(part, name).item() for part in parts) == pytest.approx(getattr(got, name).item(), rel=1e-5)
    assert any(part.video == 0 for part in parts) and any(part.text == 0 for part in parts)

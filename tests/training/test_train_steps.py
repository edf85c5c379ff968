"""What one optimiser step does: schedule, clipping, decay, averages, accumulation, the change of stage."""

import math

import pytest
import torch
from tiny_run import log_of, stage, tiny, trained

from uvg_engine.model.layout import Layout
from uvg_engine.training.loop import Trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def gradients(trainer):
    """Gradients of the first step, as AdamW saw them: its first moment is (1 - beta1) of them."""
    state = trainer.optimizer.state
    return {n: state[p]["exp_avg"] / 0.1 for n, p in trainer.model.named_parameters() if p in state}


def norm_of(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def test_learning_rate_warms_up_and_falls_in_each_stage(tmp_path):
    first = stage("first", steps=8, lr=1e-3, warmup=3, schedule="cosine", final_lr_ratio=0.1)
    second = stage("second", steps=5, lr=2e-3, warmup=2, schedule="constant")
    trainer = Trainer(tiny(first, second, batch_size=1), tmp_path)
    rates = [trainer.train_step()["lr"] for _ in range(13)]
    cosine = [1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 5)) / 2) for k in range(5)]
    wanted = [1e-3 / 3, 2e-3 / 3, 1e-3, *cosine, 1e-3, 2e-3, 2e-3, 2e-3, 2e-3]
    assert rates == pytest.approx(wanted, rel=1e-12)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {rates[-1]}


def test_ema_follows_its_formula(tmp_path):
    trainer = Trainer(tiny(stage(steps=6), ema=0.3), tmp_path)
    average = {name: w.double() for name, w in weights(trainer).items()}
    for n in range(1, 7):
        trainer.train_step()
        decay = min(0.3, (1 + n) / (10 + n))
        for name, w in weights(trainer).items():
            average[name] = decay * average[name] + (1 - decay) * w.double()
    for name, p in trainer.ema.model.named_parameters():
        torch.testing.assert_close(p.double(), average[name], rtol=1e-5, atol=1e-6)
        assert not p.requires_grad
    assert min((1 + n) / (10 + n) for n in range(1, 7)) < 0.3 < max((1 + n) / (10 + n) for n in range(1, 7))


def test_gradients_are_clipped_as_one_vector(tmp_path):
    free = Trainer(tiny(stage(), clip_norm=1e9), tmp_path / "free")
    clipped = Trainer(tiny(stage(), clip_norm=0.01), tmp_path / "clipped")
    norms = [trainer.train_step()["grad_norm"] for trainer in (free, clipped)]
    assert norms[0] == norms[1] > 0.01  # the log tells the norm before clipping
    assert norm_of(gradients(free)) == pytest.approx(norms[0], rel=1e-4)
    assert norm_of(gradients(clipped)) == pytest.approx(0.01, rel=1e-4)
    for name, gradient in gradients(free).items():
        torch.testing.assert_close(gradients(clipped)[name], gradient * (0.01 / norms[0]), rtol=1e-3, atol=1e-9)


def test_decay_pulls_at_matrices_and_leaves_vectors(tmp_path):
    lr, decay = 0.1, 0.5
    runs = [Trainer(tiny(stage(lr=lr), weight_decay=d), tmp_path / str(d)) for d in (0.0, decay)]
    start = weights(runs[0])
    for trainer in runs:
        trainer.train_step()
    plain, decayed = (weights(trainer) for trainer in runs)
    learning = gradients(runs[0])  # the other parts wait for a stage with text
    for name, w in start.items():
        pulled = decayed[name] - plain[name]
        expected = -lr * decay * w if w.ndim >= 2 and name in learning else torch.zeros_like(w)
        torch.testing.assert_close(pulled, expected, rtol=1e-4, atol=1e-6 if w.ndim >= 2 else 0.0)
    assert {start[name].ndim for name in learning} >= {1, 2}


@pytest.mark.parametrize("accumulate", [2, 4, 8])
@pytest.mark.parametrize("shares", [{"generate": 0.0, "caption": 0.0}, {"generate": 0.4, "caption": 0.4}])
def test_accumulation_equals_one_big_batch(tmp_path, accumulate, shares):
    """Whatever the parts hold: with corners in the mix their numbers of noisy tokens differ, down to none."""
    logs, runs = [], []
    for parts in (1, accumulate):
        config = tiny(stage("only", "prompt", **shares), accumulate=parts, clip_norm=1e9, batch_size=8)
        runs.append(Trainer(config, tmp_path / str(parts)))
        logs.append(runs[-1].train_step())
    for name in ("loss", "video", "text", "grad_norm"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)
    whole, parts = (gradients(trainer) for trainer in runs)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-5 * norm_of(whole))


def test_the_text_parts_are_born_from_the_video_parts(tmp_path):
    """A second stage of no learning rate shows the weights of the moment when it began."""
    config = tiny(stage(steps=3), stage("recall", "prompt", steps=1, lr=1e-30), weight_decay=0.0)
    trainer = Trainer(config, tmp_path)
    inputs = video_inputs(trainer)
    for _ in range(3):
        trainer.train_step()
    before = velocity(trainer.model, inputs)
    assert before.abs().max() > 0
    kept = {n: w.clone() for n, w in trainer.model.state_dict().items() if not is_text(n)}
    trainer.train_step()
    assert torch.equal(velocity(trainer.model, inputs), before)
    assert all(torch.equal(trainer.model.state_dict()[name], w) for name, w in kept.items())
    for model in (trainer.model, trainer.ema.model):
        state = model.state_dict()
        pairs = [(n, n.replace("_v", "_t")) for n in state if n.startswith(("time_embedding_v", "scale_shift_table_v"))]
        pairs += [(n, n.replace(".ffn.", ".ffn_t.")) for n in state if ".ffn." in n]
        assert len(pairs) == 7 + 4 * 2
        assert all(torch.equal(state[video], state[text]) for video, text in pairs)
        assert (
            state["text_head.linear.weight"].abs().max() < 1e-20 and state["text_head.linear.bias"].abs().max() < 1e-20
        )
        assert 0.01 < state["vocab_embed.weight"].std() < 0.03


def is_text(name):
    return "_t." in name or name.endswith("_t") or name.startswith(("text_head", "vocab_embed"))


def video_inputs(trainer):
    generator = torch.Generator().manual_seed(5)
    grid, channels = (2, 2, 2), trainer.model.config.in_channels
    layout = Layout.build([grid] * 2, [0, 0], [3, 1])
    latents = torch.randn(2 * channels * 2 * 4 * 4, generator=generator)
    return layout, latents, torch.tensor([900.0, 120.0]), torch.randn(4, 16, generator=generator)


@torch.no_grad()
def velocity(model, inputs):
    """What the model predicts where there is no text."""
    layout, latents, times, cond = inputs
    condition = model.condition_kv(cond, layout.cond_lens)
    none = torch.zeros(0, dtype=torch.int64)
    return model.packed(latents, none, layout, times, torch.zeros(2), condition).velocity


def test_a_later_text_stage_keeps_what_was_learned(tmp_path):
    config = tiny(stage("recall", "prompt"), stage("refine", "caption", steps=1, lr=1e-30), weight_decay=0.0)
    trainer = Trainer(config, tmp_path)
    for _ in range(2):
        trainer.train_step()
    before = weights(trainer)
    trainer.train_step()
    assert all(torch.allclose(w, before[name], rtol=0, atol=1e-20) for name, w in weights(trainer).items())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    trainer = Trainer(tiny(stage(steps=9, lr=1e30), checkpoint_every=1, log_every=1), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"loss and gradient must stay finite, got loss .* in step \d+, stage video, lr .*start one with init",
    ):
        trainer.run()
    stopped = trainer.step
    assert 1 <= stopped < 9
    assert all(w.isfinite().all() for w in weights(trainer).values())
    again = Trainer(trainer.config, tmp_path, resume=True)
    assert again.step == stopped == log_of(tmp_path)[-1]["step"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls_on_two_clips(tmp_path, dtype):
    two = {"type": "digits", "size": 2}
    config = tiny(stage("only", "prompt", steps=40), data=two, dtype=dtype, log_every=10)
    trainer = trained(config, tmp_path)
    first, *_, last = log_of(tmp_path)
    assert last["text"] < 0.85 * first["text"] and last["video"] < 0.85 * first["video"]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}

"""A run's folder, its newest checkpoint or the trainer itself as the parts of an engine."""

import pytest
import torch

from uvg_engine.sampling import Engine
from uvg_engine.training.config import TrainConfig
from uvg_engine.training.loop import Trainer
from uvg_engine.training.publish import engine_defaults, engine_parts, find_checkpoint

TINY = {
    "model": {"heads": 1, "head_dim": 16, "text_dim": 16, "freq_dim": 16, "ffn_dim": 16, "layers": 1},
    "data": {"type": "digits"},
    "codec": {"type": "pixel", "block": [4, 8, 8], "keep": [1, 1, 1]},
    "text_encoder": {"type": "hash", "text_dim": 16, "max_len": 16},
    "batch_size": 1,
    "text_length": 28,
    "defaults": {"name": "tiny", "jobs": {"generate": {"steps": 2, "guidance": 1.0}}},
    "stages": [{"name": "only", "text": "prompt", "steps": 2, "lr": 1.0e-3}],
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trainer = Trainer(TrainConfig.from_dict(TINY), tmp_path_factory.mktemp("publish") / "run")
    trainer.train_step()
    trainer.save()
    return trainer


@pytest.mark.parametrize("ema", [True, False])
def test_the_chosen_weights_come_out_of_a_run(trainer, ema):
    wanted = (trainer.ema.model if ema else trainer.model).state_dict()
    for source in (trainer, trainer.folder, find_checkpoint(trainer.folder)):
        got = engine_parts(source, ema=ema)["model"].state_dict()
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_parts_are_a_copy(trainer):
    part = engine_parts(trainer, ema=False)["model"]
    before = trainer.model.patch_embedding.weight.detach().clone()
    with torch.no_grad():
        part.patch_embedding.weight.zero_()
    assert torch.equal(trainer.model.patch_embedding.weight, before)


def test_an_engine_from_parts_survives_the_disk(trainer, tmp_path):
    engine = Engine(**engine_parts(trainer.folder))
    engine.save_pretrained(tmp_path / "model")
    again = Engine.from_pretrained(tmp_path / "model")
    assert again.defaults == engine.defaults
    prompt = "a red seven moving right, fast"
    one, two = (e.generate(prompt, seeds=3)[0] for e in (engine, again))
    assert torch.equal(one.frames, two.frames)
    assert one.frames.shape == (8, 32, 32, 3)


def test_defaults_say_how_it_was_trained():
    config = TrainConfig.from_dict({**TINY, "source": "uniform", "times": {"text_power": 2.0}})
    defaults = engine_defaults(config)
    assert defaults["source"] == "uniform" and defaults["text_length"] == 28 and defaults["name"] == "tiny"
    assert defaults["jobs"]["caption"] == {"kappa_power": 2.0}
    assert defaults["jobs"]["generate"] == {"kappa_power": 2.0, "steps": 2, "guidance": 1.0}
    folder = TrainConfig.from_dict({**TINY, "data": {"type": "folder", "path": "clips", "clip_shape": [4, 16, 24]}})
    assert [engine_defaults(folder)[name] for name in ("frames", "height", "width")] == [4, 16, 24]


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(ValueError, match="with a checkpoint"):
        engine_parts(tmp_path)
    strange = tmp_path / "strange.pt"
    torch.save({"model": {}}, strange)
    with pytest.raises(ValueError, match="without codec, config, ema, ema_updates, optimizer, rng, step, tokenizer"):
        engine_parts(strange)

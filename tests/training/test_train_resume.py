"""A run that was given up and resumed is the run that was not: weights, averages, optimiser and log, bitwise."""

import json
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import TINY, assert_same, assert_same_run, log_of, stage, tiny, trained

from uvg_engine.model.univigu import UniViGU
from uvg_engine.training.config import TrainConfig
from uvg_engine.training.data import export
from uvg_engine.training.data.digits import DigitsDataset
from uvg_engine.training.loop import Trainer
from uvg_engine.training.pieces import make_dataset, make_pieces, model_config
from uvg_engine.training.publish import engine_parts
from uvg_engine.training.state import checkpoints, load_checkpoint

STAGES = (stage(steps=3, warmup=2), stage("recall", "prompt", 3), stage("refine", "caption", 3))
EVERY = {"checkpoint_every": 2, "log_every": 2}


@pytest.mark.parametrize("changes", [{"accumulate": 2, "loss": "gkl"}, {"dtype": "bfloat16", "source": "uniform"}])
def test_resumed_equals_uninterrupted(tmp_path, changes):
    config = tiny(*STAGES, **EVERY, **changes)
    whole = trained(config, tmp_path / "whole")
    # in a stage on a log line, at the end of a stage off one, twice in the middle of a stage
    pieced = trained(config, tmp_path / "pieced", 2, 3, 5, 7)
    assert whole.step == pieced.step == config.total_steps
    assert_same_run(whole, pieced)
    assert [line["step"] for line in log_of(tmp_path / "whole")] == [2, 4, 6, 8, 9]
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "pieced")


def test_a_run_is_a_function_of_its_config(tmp_path):
    one, two, other = (trained(tiny(seed=s), tmp_path / n) for n, s in (("one", 3), ("two", 3), ("other", 4)))
    assert_same_run(one, two)
    assert not torch.equal(one.model.patch_embedding.weight, other.model.patch_embedding.weight)


def test_a_crash_between_checkpoints_repeats_the_lost_steps(tmp_path):
    config = tiny(*STAGES, checkpoint_every=4, log_every=1)
    whole = trained(config, tmp_path / "whole")

    class Crash(Exception):
        pass

    def crash(step, log):
        if step == 7:
            raise Crash

    with pytest.raises(Crash):
        Trainer(config, tmp_path / "crashed").run(crash)
    with open(tmp_path / "crashed" / "log.jsonl", "a") as file:
        file.write('{"step": 7, "sta')  # a line that the kill cut short
    resumed = Trainer(config, tmp_path / "crashed", resume=True)
    assert resumed.step == 4
    resumed.run()
    assert_same_run(whole, resumed)
    assert log_of(tmp_path / "crashed") == log_of(tmp_path / "whole")
    assert_tensorboard_shows_the_log(tmp_path / "crashed")


def assert_tensorboard_shows_the_log(folder):
    shown = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True).Reload()
    for name in ("loss", "video", "lr", "grad_norm"):
        wanted = [(line["step"], pytest.approx(line[name])) for line in log_of(folder) if name in line]
        assert [(event.step, event.value) for event in shown.Scalars(name)] == wanted


def test_without_a_checkpoint_the_run_and_its_log_start_anew(tmp_path):
    config = tiny(stage(steps=3), log_every=1)
    Trainer(config, tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "stage": "video", "loss": 1.0}\n')
    resumed = Trainer(config, tmp_path, resume=True)
    assert resumed.step == 0
    resumed.run()
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3]


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    config = tiny(stage(steps=2))
    trained(config, tmp_path)
    before = (tmp_path / "log.jsonl").read_text()
    again = Trainer(config, tmp_path, resume=True)
    again.run()
    assert again.step == 2 and (tmp_path / "log.jsonl").read_text() == before


@pytest.fixture
def stopped(tmp_path):
    """The folder of a run with checkpoints of steps 2 and 4 out of 9, and its config."""
    config = tiny(*STAGES, **EVERY)
    Trainer(config, tmp_path / "run").run(stop_at=4)
    return tmp_path / "run", config


def test_the_folder_is_told_what_is_in_it(stopped):
    folder, config = stopped
    assert TrainConfig.from_yaml(folder / "config.yaml") == config
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step_00000002.pt", "step_00000004.pt"]
    with pytest.raises(ValueError, match=r"output folder must hold no run unless resumed, got .* step_00000004.pt"):
        Trainer(config, folder)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trained(tiny(stage(steps=5), checkpoint_every=1, keep_checkpoints=3), tmp_path)
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == [f"step_0000000{n}.pt" for n in (3, 4, 5)]


def test_a_changed_config_is_refused_by_name(stopped):
    folder, config = stopped
    values = config.to_dict()
    changed = {**values, "batch_size": 8, "stages": [dict(s) for s in values["stages"]]}
    changed["stages"][2]["lr"] = 1.0
    with pytest.raises(
        ValueError, match=r"a resumed run must keep its config, got changes in batch_size, stages\[2\].lr$"
    ):
        Trainer(TrainConfig.from_dict(changed), folder, resume=True)


def damage(path, how):
    content = path.read_bytes()
    if how == "flipped":
        middle = len(content) // 2
        content = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
    else:
        content = content[: int(how * len(content))]
    path.write_bytes(content)


@pytest.mark.parametrize("how", [0.0, 0.01, 0.5, 0.999, "flipped"])
def test_a_damaged_checkpoint_is_told_and_never_skipped(stopped, how):
    folder, config = stopped
    newest = folder / "checkpoints" / "step_00000004.pt"
    damage(newest, how)
    with pytest.raises(ValueError, match="must be a whole checkpoint") as caught:
        Trainer(config, folder, resume=True)
    told = str(caught.value)
    assert str(newest) in told and told.endswith("delete it to go on from step_00000002.pt") and "\n" not in told
    newest.unlink()
    assert Trainer(config, folder, resume=True).step == 2


def test_the_only_checkpoint_damaged(stopped):
    folder, config = stopped
    (folder / "checkpoints" / "step_00000002.pt").unlink()
    damage(folder / "checkpoints" / "step_00000004.pt", 0.5)
    with pytest.raises(ValueError, match=r"delete it to start again$"):
        Trainer(config, folder, resume=True)


def test_a_checkpoint_of_something_else(stopped):
    folder, config = stopped
    for strange in ([1, 2], {"model": {}}):
        torch.save(strange, folder / "checkpoints" / "step_00000008.pt")
        with pytest.raises(ValueError, match=r"must be a checkpoint of uvg train, got one without .*config.*step"):
            Trainer(config, folder, resume=True)


def test_checkpoints_run_no_code(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    (tmp_path / "checkpoints").mkdir()
    torch.save({"config": Harm()}, tmp_path / "checkpoints" / "step_00000001.pt")
    with pytest.raises(ValueError, match="must hold tensors and plain values only") as caught:
        Trainer(tiny(), tmp_path, resume=True)
    assert not (tmp_path / "harm").exists() and "weights_only" not in str(caught.value)


def test_a_checkpoint_without_the_later_names_resumes(stopped, tmp_path):
    """Runs begun before `window` and `data_size` were kept go on with the same weights."""
    folder, config = stopped
    path = folder / "checkpoints" / "step_00000004.pt"
    saved = load_checkpoint(path)
    torch.save({name: value for name, value in saved.items() if name not in ("window", "data_size")}, path)
    resumed = trained(config, tmp_path / "whole"), Trainer(config, folder, resume=True)
    resumed[1].run()
    assert_same_run(*resumed)


@pytest.fixture
def clips(tmp_path):
    """A config for a folder of three clips, with the codec's statistics left to be measured on it."""
    export("train", 3, tmp_path / "clips", scale=1)
    codec = {name: value for name, value in TINY["codec"].items() if name not in ("mean", "std")}
    data = {"type": "folder", "path": str(tmp_path / "clips")}
    return tiny(stage(steps=2), stage("recall", "prompt"), data=data, codec=codec, batch_size=2)


def test_a_resumed_run_keeps_its_codec_and_words(clips, tmp_path):
    """They are part of the checkpoint: what is measured anew on changed files would shift every latent."""
    before = Trainer(clips, tmp_path / "run")
    before.run(stop_at=1)
    shutil.copy(tmp_path / "clips" / "000001.mp4", tmp_path / "clips" / "000000.mp4")
    changed = Trainer(clips, tmp_path / "other")
    assert changed.pieces.codec.to_config() != before.pieces.codec.to_config()
    resumed = Trainer(clips, tmp_path / "run", resume=True)
    assert resumed.pieces.codec.to_config() == before.pieces.codec.to_config()
    assert resumed.pieces.tokenizer.to_config() == before.pieces.tokenizer.to_config()


def test_a_folder_that_grew_is_refused(clips, tmp_path):
    Trainer(clips, tmp_path / "run").run(stop_at=1)
    metadata = tmp_path / "clips" / "metadata.jsonl"
    metadata.write_text(metadata.read_text() + json.dumps({"file": "000000.mp4", "prompt": "one more"}) + "\n")
    with pytest.raises(ValueError, match="a resumed run must keep its data of 3 samples, got 4"):
        Trainer(clips, tmp_path / "run", resume=True)


def test_what_a_run_started_from_is_not_asked_for_again(tmp_path):
    config = tiny(stage(steps=2))
    torch.manual_seed(9)
    sizes = model_config(config, make_pieces(config, make_dataset(config)))
    UniViGU(sizes).save_pretrained(tmp_path / "start")
    config = tiny(stage(steps=2), init=f"pretrained:{tmp_path / 'start'}")
    fresh = Trainer(config, tmp_path / "run")
    start = UniViGU.from_pretrained(tmp_path / "start").state_dict()
    assert_same(dict(fresh.model.state_dict()), dict(start))
    fresh.run(stop_at=1)
    shutil.rmtree(tmp_path / "start")
    Trainer(config, tmp_path / "run", resume=True).run()
    assert engine_parts(tmp_path / "run")["model"].config == sizes


def test_torchs_defaults_are_those_of_nothing(tmp_path, monkeypatch):
    """In fp64 weights, losses and checkpoints were fp64. Before, meanwhile and after, torch's defaults are the
    caller's: the default dtype of all threads was fp32 while a trainer was made or made a step."""
    want = trained(tiny(), tmp_path / "plain")
    seen = []
    monkeypatch.setattr(DigitsDataset, "batch", _telling(DigitsDataset.batch, seen))
    monkeypatch.setattr(UniViGU, "reset_parameters", _telling(UniViGU.reset_parameters, seen))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = trained(tiny(), tmp_path / "other", 3)
            model = engine_parts(got)["model"]
            assert torch.empty(0).is_meta and torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(before)
    assert_same_run(got, want)
    assert_same(model.state_dict(), want.ema.model.state_dict())
    assert len(seen) > 6 and set(seen) == {torch.float64}


def _telling(method, seen):
    """The method; torch's default dtype, which is that of all threads, is added to `seen` at its calls."""

    def call(*args, **more):
        seen.append(torch.get_default_dtype())
        return method(*args, **more)

    return call

"""A run's folder: one process at a time, what it says where a disk fails, and how far a run may be asked to go."""

import errno
import logging
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_run import SERVER, log_of, stage, tiny, trained

from uvg_engine.training.loop import Trainer
from uvg_engine.training.state import checkpoints

CONFIG = tiny(stage(steps=4), checkpoint_every=1, log_every=1)


def attempt(folder, told):
    """In a child: go on with a run of the folder; what came of it is written to `told`."""
    try:
        Trainer(CONFIG, folder, resume=True).run()
        told.write_text("it ran")
    except ValueError as error:
        told.write_text(str(error))


def test_a_folder_serves_one_process_at_a_time(tmp_path):
    """A second one cut the log of the first and removed the checkpoint that it was writing."""
    run, seen = tmp_path / "run", []

    def meanwhile(step, log):
        if step == 2:
            child = SERVER.Process(target=attempt, args=(run, tmp_path / "told"))
            child.start()
            child.join()
            seen.append((tmp_path / "told").read_text())

    Trainer(CONFIG, run).run(meanwhile)
    assert seen == [f"output folder must not be that of a run still training, got {run}"]
    assert [line["step"] for line in log_of(run)] == [1, 2, 3, 4]
    attempt(run, tmp_path / "told")
    assert (tmp_path / "told").read_text() == "it ran"


def test_a_trainer_that_was_overtaken_does_not_go_on(tmp_path):
    early = Trainer(CONFIG, tmp_path)
    early.run(stop_at=1)
    Trainer(CONFIG, tmp_path, resume=True).run()
    with pytest.raises(ValueError, match=r"output folder must hold no step after 1, got .*step_00000004.pt: resume"):
        early.run()


@pytest.mark.parametrize(("code", "is_told"), [(errno.ENOLCK, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog, code, is_told):
    import fcntl

    def refuse(*args):
        raise OSError(code, "no")

    monkeypatch.setattr(fcntl, "flock", refuse)
    if not is_told:
        with pytest.raises(ValueError, match="output folder must be writable"):
            Trainer(CONFIG, tmp_path)
        return
    with caplog.at_level(logging.WARNING):
        Trainer(CONFIG, tmp_path).run(stop_at=1)
    assert "take care that no second process trains in it" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_that_takes_no_more_is_named(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"log.jsonl must be writable, got .*No space left on device"):
        Trainer(CONFIG, tmp_path).run()


def test_lines_that_a_crash_left_in_the_log_go(tmp_path):
    Trainer(CONFIG, tmp_path).run(stop_at=2)
    kept = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_bytes(kept.encode() + b"\0\0\0\xff}\n" + b'{"step": 3, "sta')
    Trainer(CONFIG, tmp_path, resume=True)
    assert (tmp_path / "log.jsonl").read_text() == kept


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    """Whoever deletes it as told loses what is whole."""
    Trainer(CONFIG, tmp_path).run(stop_at=2)
    newest = checkpoints(tmp_path / "checkpoints")[-1]

    def fail(error):
        def read(*args, **more):
            raise error

        return read

    for place, name, error in (
        (zipfile.ZipFile, "testzip", OSError(errno.EIO, "Input/output error")),
        (torch, "load", MemoryError()),
        (torch, "load", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail(error))
            with pytest.raises(type(error)) as caught:
                Trainer(CONFIG, tmp_path, resume=True)
        assert caught.value is error and newest.is_file()
    newest.rename(tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        Trainer(CONFIG, tmp_path, resume=True)


def test_a_run_past_its_stop_is_refused(tmp_path):
    trainer = Trainer(CONFIG, tmp_path)
    trainer.run(stop_at=3)
    trainer.run(stop_at=3)
    assert trainer.step == 3
    for resumed in (trainer, Trainer(CONFIG, tmp_path, resume=True)):
        with pytest.raises(ValueError, match="stop_at must be at least 3, the step that the run has reached, got 2"):
            resumed.run(stop_at=2)
    trainer.run(stop_at=99)
    assert trainer.step == 4


def test_a_batch_may_be_split_otherwise_when_a_run_goes_on(tmp_path, caplog):
    config = tiny(stage("only", "prompt", 4), log_every=1)
    whole = trained(config, tmp_path / "whole")
    Trainer(config, tmp_path / "run").run(stop_at=2)
    split = tiny(stage("only", "prompt", 4), log_every=1, accumulate=4)
    with caplog.at_level(logging.WARNING):
        resumed = Trainer(split, tmp_path / "run", resume=True)
    assert "accumulate and ranks were 1 and 1, now 4 and 1" in caplog.text
    resumed.run()
    for name in ("loss", "video", "text", "grad_norm"):
        values = [[line[name] for line in log_of(tmp_path / folder)] for folder in ("whole", "run")]
        assert values[0][:2] == values[1][:2] and values[0] == pytest.approx(values[1], rel=1e-3)
    assert resumed.step == whole.step
    caplog.clear()
    Trainer(split, tmp_path / "run", resume=True)
    assert not caplog.text

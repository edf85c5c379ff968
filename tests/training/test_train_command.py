"""`uvg train` as a user types it: a training file, a folder of clips, interruptions, torchrun."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from tiny_run import SERVER, TINY, assert_same, log_of, stage, tiny, trained

from uvg_engine.cli import main
from uvg_engine.sampling import Engine
from uvg_engine.training.state import checkpoints, load_checkpoint

STAGES = [stage(steps=2), stage("recall", "prompt", 2)]


@pytest.fixture
def file(tmp_path):
    """Writes a training file of tiny settings with some replaced; returns its path."""

    def write(**changes):
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump({**TINY, "stages": STAGES, "log_every": 1, **changes}))
        return str(path)

    return write


def steps_of(folder):
    return [line["step"] for line in log_of(folder)]


def test_train_stop_and_resume(file, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", "--config", file(), "--output", str(run)]
    assert main([*command, "--stop-at", "1"]) == 0
    shown = capsys.readouterr()
    assert "4 steps, from step 0" in shown.err and "the model at step 1 of 4" in shown.out
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("error: output folder must hold no run unless resumed, got")
    assert main([*command, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": str(run / "model"), "step": 4, "total_steps": 4}
    assert steps_of(run) == [1, 2, 3, 4]
    model = (run / "model" / "model.safetensors").read_bytes()
    assert main([*command, "--resume", "--stop-at", "3"]) == 2
    told = capsys.readouterr()
    assert (
        told.err.endswith("error: stop_at must be at least 4, the step that the run has reached, got 3\n")
        and not told.out
    )
    for more in ((), ("--stop-at", "4")):
        assert main([*command, "--resume", *more]) == 0
        told = capsys.readouterr()
        assert "nothing is left to train: the run has reached step 4" in told.err and "at step 4 of 4" in told.out
    assert (run / "model" / "model.safetensors").read_bytes() == model and steps_of(run) == [1, 2, 3, 4]
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert Engine.from_pretrained(run / "model").caption(torch.zeros(8, 32, 32, 3, dtype=torch.uint8), num_steps=1)


def test_train_from_a_folder_of_videos(file, tmp_path, capsys):
    assert main(["data", "export", "--output", str(tmp_path / "clips"), "--count", "3"]) == 0
    data = {"type": "folder", "path": str(tmp_path / "clips"), "clip_shape": [4, 16, 32]}
    codec = {name: value for name, value in TINY["codec"].items() if name not in ("mean", "std")}
    stages = [stage(steps=1), stage("refine", "caption", 1)]
    config = file(data=data, codec=codec, stages=stages)
    assert main(["train", "-c", config, "-o", str(tmp_path / "run")]) == 0
    assert "told once for the folder" in capsys.readouterr().err
    assert steps_of(tmp_path / "run") == [1, 2]
    (video,) = Engine.from_pretrained(tmp_path / "run" / "model").generate("a red seven", num_steps=1)
    assert video.frames.shape == (4, 16, 32, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": 1}, "unknown ['sed']"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16"),
        ({"data": {"type": "digit"}}, "data.type must be one of digits, folder, got 'digit'"),
        ({"data": {"type": "digits", "split": "test"}}, "split must be"),
        ({"data": {"type": "digits", "sise": 3}}, "data settings must fit digits"),
        ({"data": {"type": "folder"}}, "data settings must fit folder"),
        ({"data": {"type": "folder", "path": "no such folder"}}, "folder must be an existing directory"),
        ({"codec": {"type": "pixel", "block": [3, 8, 8], "keep": [1, 1, 1]}}, "multiples of the block (3, 8, 8)"),
        ({"model": {**TINY["model"], "patch": [1, 3, 2]}}, "must be divisible by the patch (1, 3, 2)"),
        ({"model": {**TINY["model"], "text_dim": 32}}, "model.text_dim must be 16 as the text encoder has it, got 32"),
        ({"model": {**TINY["model"], "in_channels": 4}}, "model.in_channels must be 3 as the codec has it, got 4"),
        ({"model": {**TINY["model"], "vocab": 9}}, "model.vocab must be at least the tokenizer's"),
        ({"model": {**TINY["model"], "depth": 9}}, "unknown ['depth']"),
        ({"model": "7b"}, "config must be one of 1.3b, 14b, digits, got '7b'"),
        ({"init": "elsewhere"}, "init must be KIND:PATH"),
        ({"codec": {**TINY["codec"], "mean": None, "keep": 5}}, "keep must be three positive integers, got 5"),
        ({"codec": {"type": "pixel", "block": [4, 8, 8], "keep": [1, 1, 1], "mean": [0.0] * 3}}, "got mean alone"),
        ({"text_encoder": {"type": "hash", "text_dim": "16"}}, "text_dim must be a positive integer, got '16'"),
        ({"tokenizer": {"type": "word", "words": 5}}, "a word tokenizer config must be"),
        ({"data": {"type": ["digits"]}}, "data.type must be one of digits, folder, got ['digits']"),
        ({"defaults": {"nmae": "x"}}, "nmae"),
        ({"defaults": {"jobs": 5}}, "jobs must be a mapping of generate, caption, joint, got 5"),
        ({"defaults": {"jobs": {"joint": 3}}}, "jobs.joint must be a mapping, got 3"),
        ({"data": {"type": "folder", "path": ".", "clip_shape": 8}}, "clip_shape must be three positive integers"),
        (
            {"data": {"type": "folder", "path": ".", "clip_shape": [8.5, 32, 32]}},
            "clip_shape must be three positive int",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_told_before_the_work(file, tmp_path, capsys, changes, message):
    assert main(["train", "-c", file(**changes), "-o", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def command(args, errors):
    """In a child: `uvg` with stderr in a file."""
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os._exit(main(args))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("every", "place"), [(1, "step_00000"), (10**6, "step 0, there is no checkpoint yet")])
def test_ctrl_c_tells_how_to_go_on(file, tmp_path, every, place):
    run, errors = tmp_path / "run", tmp_path / "stderr"
    args = ["train", "-c", file(stages=[stage(steps=10**6)], checkpoint_every=every), "-o", str(run)]
    child = SERVER.Process(target=command, args=(args, str(errors)))
    child.start()
    while child.is_alive() and not ((run / "log.jsonl").is_file() and len(steps_of(run)) >= 3):
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGINT)
    child.join()
    assert child.exitcode == 130
    told = errors.read_text()
    assert f"the same command with --resume goes on from {place}" in told and "Traceback" not in told
    newest = load_checkpoint(checkpoints(run / "checkpoints")[-1])["step"] if every == 1 else 0
    assert main([*args, "--resume", "--stop-at", str(newest + 1)]) == 0
    assert steps_of(run) == list(range(1, newest + 2))


@pytest.mark.timeout(900)  # three new interpreters
def test_two_ranks_equal_one_process_that_accumulates(file, tmp_path):
    """A rank's part of the batch is a micro-batch of one process; both halves are added up, so bitwise."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "uvg_engine.cli", "train", "-c", file(), "-o", str(tmp_path / "ranks")]
    done = subprocess.run(
        [*launcher, *train], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the model at step 4 of 4") == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: another number of threads sums in another order
    try:
        one = trained(tiny(*STAGES, log_every=1, accumulate=2), tmp_path / "one")
    finally:
        torch.set_num_threads(threads)
    saved, wanted = load_checkpoint(checkpoints(tmp_path / "ranks" / "checkpoints")[-1]), one.state()
    for name in ("model", "ema", "ema_updates", "optimizer", "step"):
        assert_same(saved[name], wanted[name], name)
    assert log_of(tmp_path / "ranks") == log_of(tmp_path / "one")

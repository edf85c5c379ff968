"""A run that is killed while it writes: whole checkpoints only, and the next run goes on to the same bits.

The children are forked from a server that has imported everything, so that each costs no start of an interpreter. They
kill themselves with SIGKILL at a named moment of the writing: at the event that Python raises before it opens, renames
or removes a file, or, for a death in the middle of the bytes, with the signal that a file size limit sends.
"""

import os
import resource
import signal
import sys

import pytest
from tiny_run import SERVER, assert_same_run, log_of, stage, tiny, trained

from uvg_engine.training.loop import Trainer
from uvg_engine.training.state import checkpoints, load_checkpoint

CONFIG = tiny(stage(steps=3), stage("recall", "prompt", 4), checkpoint_every=1, keep_checkpoints=2, log_every=1)


def die_at(event, of, count):
    """SIGKILL this process at the count-th audit event of this name on a file of the checkpoints' folder."""
    seen = 0

    def hook(name, args):
        nonlocal seen
        if name == event and args and isinstance(args[0], str | os.PathLike) and of in os.fspath(args[0]):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def go_on(folder, event, of, count):
    die_at(event, of, count)
    Trainer(CONFIG, folder, resume=True).run()


def go_on_with_little_room(folder, size, action):
    """A file that would grow beyond `size` bytes kills, or with SIG_IGN fails, as on a full disk."""
    trainer = Trainer(CONFIG, folder, resume=True)
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        trainer.run()
    except OSError as error:
        (folder / "told").write_text(str(error))


def exit_code(target, *args):
    child = SERVER.Process(target=target, args=args)
    child.start()
    child.join()
    return child.exitcode


def assert_all_whole(folder):
    """Every file that counts as a checkpoint is one, and the two newest are there."""
    found = checkpoints(folder / "checkpoints")
    assert [load_checkpoint(path)["step"] for path in found] == [int(path.stem.split("_")[1]) for path in found]
    return [int(path.stem.split("_")[1]) for path in found]


@pytest.mark.timeout(900)  # nine processes, one after the other
def test_killed_again_and_again_while_writing(tmp_path):
    whole, folder = trained(CONFIG, tmp_path / "whole"), tmp_path / "killed"
    size = checkpoints(tmp_path / "whole" / "checkpoints")[-1].stat().st_size
    kills = [  # the steps whose checkpoints are there after each
        (go_on, "open", "step_00000001.pt.", 1, []),
        (go_on_with_little_room, size // 100, signal.SIG_DFL, []),
        (go_on, "os.rename", ".pt.", 1, []),
        (go_on, "os.rename", ".pt.", 3, [1, 2]),
        (go_on_with_little_room, size // 2, signal.SIG_DFL, [1, 2]),
        (go_on, "os.remove", "step_00000001.pt", 1, [1, 2, 3]),  # the new one is in place, the oldest not yet gone
        (go_on_with_little_room, size - 100, signal.SIG_DFL, [1, 2, 3]),
        (go_on, "os.rename", ".pt.", 3, [4, 5]),
    ]
    for target, *args, there in kills:
        wanted = -signal.SIGKILL if target is go_on else -signal.SIGXFSZ
        assert exit_code(target, folder, *args) == wanted, args
        assert assert_all_whole(folder) == there, args
    last = Trainer(CONFIG, folder, resume=True)
    last.run()
    assert_same_run(whole, last)
    assert log_of(folder) == log_of(tmp_path / "whole")
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"step_00000006.pt", "step_00000007.pt"}, "what the killed writers left is gone"


def test_a_full_disk_is_told_and_costs_no_checkpoint(tmp_path):
    Trainer(CONFIG, tmp_path).run(stop_at=2)
    assert exit_code(go_on_with_little_room, tmp_path, 100_000, signal.SIG_IGN) == 0
    assert "step_00000003.pt must be writable, got" in (tmp_path / "told").read_text()
    assert assert_all_whole(tmp_path) == [1, 2]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("place", ["a file", "a file/run"])
def test_a_folder_that_cannot_be_is_told_before_the_work(tmp_path, place):
    (tmp_path / "a file").write_text("mine")
    with pytest.raises(ValueError, match=r"output folder must be writable, got .*a file"):
        Trainer(CONFIG, tmp_path / place)
    assert (tmp_path / "a file").read_text() == "mine"

"""Several ranks, each a process forked from the server of tiny_run: whole batches, agreement, and one that fails."""

import os
import socket

import pytest
import torch
from tiny_run import SERVER, log_of, stage, tiny, trained

from uvg_engine.training.loop import Trainer

CONFIG = tiny(stage("only", "caption", 3), log_every=1, batch_size=8)


def rank(number, port, count, folder, told, breaks_at):
    """In a child: one rank of a run. What ends it is written to a file of its own."""
    here = {"RANK": number, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()})
    torch.set_num_threads(1)
    code = 0
    try:
        trainer = Trainer(CONFIG, folder, resume=True)
        if breaks_at is not None:
            batch = trainer.dataset.batch
            trainer.dataset.batch = lambda indices: batch(indices) if trainer.step < breaks_at else 1 // 0
        trainer.run()
    except Exception as error:
        (told / f"rank{number}").write_text(f"{type(error).__name__}: {error}")
        code = 1
    os._exit(code)  # as a process that a launcher started: sockets go with it


def run_ranks(tmp_path, folders, breaks_at=None):
    """Exit codes of ranks, rank i in folders[i]; breaks_at: by rank, the step at which its data fail."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = [
        SERVER.Process(target=rank, args=(i, port, len(folders), folder, tmp_path, (breaks_at or {}).get(i)))
        for i, folder in enumerate(folders)
    ]
    for child in shared:
        child.start()
    for child in shared:
        child.join()
    return [child.exitcode for child in shared]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.timeout(900)
def test_four_ranks_weigh_every_sample_as_one_process_does(tmp_path, one_thread):
    """Means were taken of each rank's part, whose number of noisy tokens is not that of the others."""
    assert run_ranks(tmp_path, [tmp_path / "ranks"] * 4) == [0] * 4, [p.read_text() for p in tmp_path.glob("rank?")]
    trained(CONFIG, tmp_path / "one")
    logs = [log_of(tmp_path / name) for name in ("one", "ranks")]
    for name in ("loss", "video", "text", "grad_norm"):
        one, ranks = ([line[name] for line in log] for log in logs)
        assert ranks == pytest.approx(one, rel=1e-3) and ranks[0] == pytest.approx(one[0], rel=1e-5)


@pytest.mark.timeout(900)
def test_ranks_that_see_other_runs_are_refused(tmp_path):
    Trainer(CONFIG, tmp_path / "run").run(stop_at=1)
    assert run_ranks(tmp_path, [tmp_path / "run", tmp_path / "another"]) == [1, 1]
    for number, step in ((0, 1), (1, 0)):
        said = f"ValueError: every rank must have the same step to go on from, got {step} in rank {number}"
        assert (tmp_path / f"rank{number}").read_text() == said


@pytest.mark.timeout(900)
def test_a_rank_that_fails_ends_the_others(tmp_path):
    assert run_ranks(tmp_path, [tmp_path / "run"] * 2, breaks_at={1: 2}) == [1, 1]
    assert (tmp_path / "rank1").read_text().startswith("ZeroDivisionError")
    assert (tmp_path / "rank0").read_text().startswith("RuntimeError")  # gloo: the other side is gone
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2]

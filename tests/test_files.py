"""Files are written whole or not at all, whoever else writes them."""

import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from uvg_engine.files import replacing
from uvg_engine.model.tensor_files import open_weights, write_weights


def test_threads_may_save_one_path(tmp_path):
    path, errors = tmp_path / "a.safetensors", []
    start = threading.Barrier(3)

    def save(value):
        start.wait()
        for _ in range(10):
            try:
                write_weights({"w": torch.full((20_000,), value)}, path)
            except Exception as error:  # a thread's own would be lost
                errors.append(error)

    threads = [threading.Thread(target=save, args=(float(i),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    saved = open_weights(path)["w"].read()
    assert len(saved.unique()) == 1
    assert os.listdir(tmp_path) == [path.name]


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "note"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["note"]


def test_file_and_name_are_on_the_disk_and_readable(tmp_path, monkeypatch):
    path, synced = tmp_path / "note", []
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder"}
    sync = os.fsync

    def watched(handle):
        synced.append((kinds[stat.S_IFMT(os.fstat(handle).st_mode)], path.exists()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    with replacing(path) as temporary:
        temporary.write_text("new")
        temporary.chmod(0o600)
    assert synced == [("file", False), ("folder", True)]
    assert path.read_text() == "new"


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(Path(tmp_path, "none", "note")):
        pass


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_permissions_are_those_of_the_file_before_or_of_the_umask(tmp_path, umask):
    """A new file was readable by all, whatever the umask said, and so was one that had been kept from others."""
    path = tmp_path / "a.safetensors"
    write_weights({"w": torch.zeros(2)}, path)  # safetensors' own files are 0600
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    for mode in (0o600, 0o664, 0o400):
        path.chmod(mode)
        write_weights({"w": torch.ones(2)}, path)
        assert stat.S_IMODE(path.stat().st_mode) == mode and open_weights(path)["w"].read().sum() == 2
    path.chmod(0o600)
    with replacing(path) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600, "nobody else reads it while it is written"
        temporary.write_text("new")


def test_any_name_that_the_system_takes(tmp_path):
    for name in ("é" * 125 + ".txt", "n" * 255):
        with replacing(tmp_path / name) as temporary:
            temporary.write_text("new")
        assert (tmp_path / name).read_text() == "new"

"""A folder of clips: the export's round trip and one clear error for each thing a user can get wrong."""

import json
import logging

import pytest
import torch

from uvg_engine.media.video import VideoError
from uvg_engine.training.data import DigitsDataset, FolderDataset, export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    calls = []
    out = tmp_path_factory.mktemp("data") / "clips"
    export("heldout", 5, out, seed=3, progress=lambda done, count: calls.append((done, count)))
    assert calls == [(i, 5) for i in range(1, 6)]
    return out


def test_round_trip(exported):
    expected, got = DigitsDataset("heldout", 3).batch(range(5)), FolderDataset(exported).batch(range(5))
    assert got["prompts"] == expected["prompts"] and got["captions"] == expected["captions"]
    assert got["attrs"] == expected["attrs"]
    assert (got["frames"].float() - expected["frames"].float()).abs().mean() < 3
    assert sorted(p.name for p in exported.parent.iterdir()) == ["clips"]  # nothing temporary is left


def test_resize_is_told_once(exported, caplog):
    data = FolderDataset(exported, (4, 16, 24))
    with caplog.at_level(logging.WARNING):
        assert data.batch([0, 1])["frames"].shape == (2, 4, 16, 24, 3)
    assert len([r for r in caplog.records if "told once" in r.getMessage()]) == 1


def test_cache_is_bounded_and_changes_nothing(exported):
    small, none = FolderDataset(exported, cache_bytes=2 * 8 * 32 * 32 * 3), FolderDataset(exported, cache_bytes=0)
    for i in (0, 1, 2, 0, 0):
        assert torch.equal(small.item(i).frames, none.item(i).frames)
    assert len(small._cache) == 2 and not none._cache


def test_only_a_line_feed_ends_a_line(exported, tmp_path):
    """JSON may hold the other separators as they are, and texts from the web do."""
    (tmp_path / "a.mp4").write_bytes((exported / "000000.mp4").read_bytes())
    text = "one\u2028two\u2029three\x85four"
    line = json.dumps({"file": "a.mp4", "prompt": text}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(f"{line}\r\n{line}\n".encode())
    assert FolderDataset(tmp_path).texts() == [text] * 4


def test_caption_defaults_to_the_prompt(exported, tmp_path):
    (tmp_path / "a.mp4").write_bytes((exported / "000000.mp4").read_bytes())
    (tmp_path / "metadata.jsonl").write_text('\n{"file": "a.mp4", "prompt": "a cat"}\n')
    data = FolderDataset(tmp_path)
    sample = next(iter(data))
    assert (len(data), sample.prompt, sample.caption, sample.attrs) == (1, "a cat", "a cat", None)
    with pytest.raises(IndexError, match="index must be"):
        data[1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{nonsense"], "line 2: must be one JSON object"),
        (["[1]"], "line 2: must be one JSON object, got list"),
        ([json.dumps({"prompt": "x"})], "line 2: 'file' must be a text that is not empty, got no such field"),
        ([json.dumps({"file": "a.mp4"})], "line 2: 'prompt' must be"),
        ([json.dumps({"file": "a.mp4", "prompt": "  "})], "line 2: 'prompt' must be"),
        ([json.dumps({"file": "a.mp4", "prompt": "x", "caption": 3})], "line 2: 'caption' must be"),
        ([json.dumps({"file": "b.mp4", "prompt": "x"})], "line 2: 'file' must exist"),
        ([json.dumps({"file": "../a.mp4", "prompt": "x"})], "line 2: 'file' must be a path inside the folder"),
    ],
)
def test_bad_lines_name_their_number(tmp_path, lines, message):
    (tmp_path / "a.mp4").write_bytes(b"x")
    good = json.dumps({"file": "a.mp4", "prompt": "x"})
    (tmp_path / "metadata.jsonl").write_text("\n".join([good, *lines]))
    with pytest.raises(ValueError, match=message):
        FolderDataset(tmp_path)


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="existing directory"):
        FolderDataset(tmp_path / "none")
    with pytest.raises(ValueError, match=r"must hold a metadata\.jsonl"):
        FolderDataset(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="at least one video"):
        FolderDataset(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        FolderDataset(tmp_path)
    with pytest.raises(ValueError, match="clip_shape"):
        FolderDataset(tmp_path, (8, 0, 32))


def test_an_unreadable_clip_is_named(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file": "broken.mp4", "prompt": "x"}))
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        FolderDataset(tmp_path).batch([0])


def test_export_is_whole_or_absent(tmp_path):
    def stop(done, count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export("train", 2, tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_export_refuses(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="out_dir must be a new or empty folder"):
        export("train", 1, tmp_path)
    with pytest.raises(ValueError, match="count must be"):
        export("train", 0, tmp_path / "out")
    with pytest.raises(ValueError, match="split must be"):
        export("test", 1, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

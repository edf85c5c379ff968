"""Files that are broken, strange or hostile: one clear error each, and no code of theirs ever runs."""

import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from dense_model import make_config, make_model
from safetensors.torch import save_file
from weight_files import assert_same, in_form, write_sharded

from uvg_engine.model import CheckpointError, UniViGU, load_pretrained, load_published, published_config

CONFIG = make_config(layers=3)


@pytest.fixture(scope="module")
def state():
    return make_model(CONFIG).state_dict()


def put(key, value):
    return lambda state: state.update({key: value})


TABLE, BIAS = "scale_shift_table_v", "text_head.linear.bias"
# How a state dict is spoilt, and what the message must say.
WRONG_STATES = {
    "missing": (lambda s: s.pop("blocks.2.ffn_t.net.2.bias"), r"missing 1 \(blocks.2.ffn_t.net.2.bias\)"),
    "unexpected": (put("extra", torch.zeros(1)), r"unexpected 1 \(extra\)"),
    "misnamed": (lambda s: s.update(x=s.pop("vocab_embed.weight")), r"missing 1 \(vocab_embed.*unexpected 1 \(x\)"),
    "shape": (put(BIAS, torch.zeros(39)), r"shapes, got text_head.linear.bias \(39,\) for \(40,\)"),
    "scalar": (put(BIAS, torch.zeros(())), r"shapes, got text_head.linear.bias \(\)"),
    "integers": (put(TABLE, torch.zeros(1, 2, 64, dtype=torch.int64)), r"dtypes.*scale_shift_table_v (int64|I64)"),
    "float8": (put(TABLE, torch.zeros(1, 2, 64).to(torch.float8_e4m3fn)), "dtypes.*scale_shift_table_v"),
}


@pytest.mark.parametrize("form", ["mapping", "safetensors", "pth", "index"])
@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_what_does_not_fit_is_told_and_changes_nothing(wrong, form, state, tmp_path):
    change, rule = WRONG_STATES[wrong]
    spoilt = dict(state)
    change(spoilt)
    source = in_form(form, spoilt, tmp_path)
    model = UniViGU(CONFIG)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rule) as error:
        load_published(model, source)
    assert "state dict" in str(error.value) if form == "mapping" else str(tmp_path) in str(error.value)
    assert_same(model, before)


def test_a_mapping_that_is_no_state_dict_is_told(state):
    model = UniViGU(CONFIG)
    for source, rule in (
        ({}, "an empty one"),
        ({"model": {}}, "an empty one"),
        ({"step": 3}, "got 'step': int"),
        ({3: torch.zeros(1)}, "got 3: Tensor"),
        ({**state, "vocab_embed.weight": torch.zeros(40, 64).to_sparse()}, "dense tensors.*sparse"),
        ({**state, "vocab_embed.weight": torch.zeros(40, 64, device="meta")}, "with memory, got a meta tensor"),
        ({**state, "_orig_mod.vocab_embed.weight": state["vocab_embed.weight"]}, "vocab_embed.weight once"),
    ):
        with pytest.raises(CheckpointError, match=rule):
            load_published(model, source)


class Payload:
    """Runs a command when a pickle of it is trusted."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".json"])
@pytest.mark.parametrize("write", ["zip", "old", "pickle", "shard"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_never_runs(suffix, write, state, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / f"a{suffix}"
    held = {"model": {**state, "vocab_embed.weight": Payload(mark)}}
    if write == "pickle":
        path.write_bytes(pickle.dumps(Payload(mark)))
    else:
        torch.save(held, path, _use_new_zipfile_serialization=write != "old")
    source = path
    if write == "shard":
        source = tmp_path / "x.index.json"
        source.write_text(json.dumps({"weight_map": {"vocab_embed.weight": path.name}}))
    for call in (lambda: load_published(UniViGU(CONFIG), source), lambda: published_config(source)):
        with pytest.raises(CheckpointError, match=f"a{suffix}"):
            call()
    assert not mark.exists()
    if write == "zip" and suffix == ".pth":
        with pytest.raises(CheckpointError, match=r"plain tensors, got .*mkdir") as error:
            published_config(path)
        assert "False" not in str(error.value), "torch's advice to switch the protection off is not passed on"
        torch.load(path, weights_only=False)
        assert mark.exists(), "the payload works where it is trusted"


def bytes_of(state, suffix, folder):
    path = folder / f"whole{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.3, 0.9, -1])
def test_a_truncated_file_is_told(suffix, keep, state, tmp_path):
    whole = bytes_of(state, suffix, tmp_path)
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(CheckpointError, match=f"cut{suffix} must be a whole"):
        load_published(UniViGU(CONFIG), path)


def repack(state, path, change):
    """A torch file whose zip entries are written anew; change(entry) says how each is packed."""
    plain = path.with_suffix(".plain")
    torch.save(state, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), change(entry.filename))


@pytest.mark.parametrize("what", ["data/0", "data.pkl"])
def test_a_zip_that_inflates_is_told_before_it_does(what, state, tmp_path):
    """32 MB of zeros in 33 kB, as a tensor or as a part of the pickle."""
    path = tmp_path / "bomb.pth"
    held = {"w": torch.zeros(2**23)} if what == "data/0" else {"w": torch.zeros(1), "x": "0" * 2**25}
    repack(held, path, lambda name: zipfile.ZIP_DEFLATED if name.endswith(what) else zipfile.ZIP_STORED)
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=f"bomb.pth must hold its tensors uncompressed .*{what} compressed"):
        load_published(UniViGU(CONFIG), path)
    repack(dict(state), path, lambda name: zipfile.ZIP_STORED)
    with pytest.raises(CheckpointError, match="more bytes than the file has"):
        overlap(path)
        load_published(UniViGU(CONFIG), path)


def overlap(path):
    """Let every entry of a zip's directory but the pickle's be the same large one."""
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for entry in archive.infolist():
            if "data/" in entry.filename:
                entry.header_offset, entry.CRC = largest.header_offset, largest.CRC
                entry.file_size, entry.compress_size = largest.file_size, largest.compress_size
        archive.comment = b"x"  # makes it write the directory


def header(size, text=b"{}"):
    return size.to_bytes(8, "little") + text


STRANGE_FILES = {
    "garbage.pth": lambda p: p.write_bytes(b"garbage" * 99),
    "text.pt": lambda p: p.write_text("weights"),
    "words.pth": lambda p: p.write_text("hi there"),
    "nothing.pth": lambda p: p.write_bytes(b""),
    "empty.zip.bin": lambda p: zipfile.ZipFile(p, "w").close(),
    "number.pth": lambda p: torch.save(3, p),
    "list.pth": lambda p: torch.save([torch.zeros(3)], p),
    "huge.safetensors": lambda p: p.write_bytes(header(2**62)),
    "long.safetensors": lambda p: p.write_bytes(header(10**9)),
    "nojson.safetensors": lambda p: p.write_bytes(header(2, b"[[")),
    "deep.safetensors": lambda p: p.write_bytes(header(90_000, b'{"a":' + b"[" * 89_995)),
    "beyond.safetensors": lambda p: p.write_bytes(
        header(62, b'{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}  ')
    ),
    "wrap.safetensors": lambda p: p.write_bytes(
        header(70, b'{"a":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}}'[:70].ljust(70)) + b"abcd"
    ),
    "garbage.index.json": lambda p: p.write_bytes(b"\xff\xfe\x00"),
    "list.index.json": lambda p: p.write_text("[1]"),
    "deep.index.json": lambda p: p.write_text("[" * 100_000),
    "nomap.index.json": lambda p: p.write_text("{}"),
    "emptymap.index.json": lambda p: p.write_text('{"weight_map": {}}'),
    "numbers.index.json": lambda p: p.write_text('{"weight_map": {"a": 3}}'),
    "lists.index.json": lambda p: p.write_text('{"weight_map": {"a": ["b"]}}'),
    "other.gguf": lambda p: p.write_bytes(b"GGUF"),
    "folder.pth": lambda p: p.mkdir(),
    "missing.pth": lambda p: None,
    "missing.safetensors": lambda p: None,
    "pipe.pth": os.mkfifo,
}


@pytest.mark.parametrize("name", STRANGE_FILES)
def test_a_file_that_is_none_is_told(name, tmp_path):
    path = tmp_path / name
    STRANGE_FILES[name](path)
    with pytest.raises(CheckpointError, match=r"must .*got") as error:
        load_published(UniViGU(CONFIG), path)
    assert str(path) in str(error.value) and len(str(error.value)) < 400
    assert "KeyError: 1" not in str(error.value)  # of torch's reader, where a letter counts as a place


@pytest.mark.parametrize("call", [load_published, load_pretrained])
@pytest.mark.parametrize("source", [5, None, b"model.pth", torch.zeros(2), ["model.pth"]])
def test_a_source_that_is_no_path_is_told(call, source):
    with pytest.raises(CheckpointError, match=rf"must be .*a path, got {type(source).__name__}"):
        call(UniViGU(CONFIG), source)
    with pytest.raises(CheckpointError, match=rf"must be .*a path, got {type(source).__name__}"):
        published_config(source)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "", ".", "..", "sub/a.safetensors", "self.index.json", "a.txt"]
)
def test_an_index_names_weight_files_of_its_folder_only(name, state, tmp_path):
    save_file(state, tmp_path / "outside.safetensors")
    folder = tmp_path / "inside" / "sub"
    folder.mkdir(parents=True)
    for place in (folder / "a.safetensors", folder.parent / "a.txt"):
        save_file(state, place)
    index = folder.parent / "self.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, name)}))
    with pytest.raises(CheckpointError, match=r"self.index.json must name weight files of its own folder"):
        load_published(UniViGU(CONFIG), index)


def test_shards_that_are_not_what_the_index_says(state, tmp_path):
    index = write_sharded(state, tmp_path / "a")
    (index.parent / "shard-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights.index.json must name shards that are there.*shard-1"):
        load_published(UniViGU(CONFIG), index)
    shutil.copy(index.parent / "shard-0.safetensors", index.parent / "shard-1.safetensors")
    with pytest.raises(CheckpointError, match=r"shard-1.safetensors must hold what its index says, missing"):
        load_published(UniViGU(CONFIG), index)


def test_links_to_shards_serve(state, tmp_path):
    """As in the cache of huggingface_hub, where a snapshot's files are links to blobs elsewhere."""
    index = write_sharded(state, tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in index.parent.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert_same(load_published(UniViGU(CONFIG), snapshot), state)

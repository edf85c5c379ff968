"""Published weights and folders of our own: what goes out, and what comes back."""

import json
import os

import pytest
import torch
from dense_model import make_config, make_inputs, make_model
from safetensors.torch import load_file, save_file
from weight_files import assert_same, in_form

from uvg_engine.model import (
    CheckpointError,
    UniViGU,
    from_pretrained,
    load_pretrained,
    load_published,
    published_config,
    save_pretrained,
    save_published,
)
from uvg_engine.training.initial import initial_weights

CONFIG = make_config(layers=3)
SHARD = 60_000  # bytes; the model has about 300 kB


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG)


@pytest.fixture(scope="module")
def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


FORMS = ["mapping", "nested", "wrapped", "safetensors", "pth", "old pth", "bare pt", "index", "index of bin", "folder"]


@pytest.mark.parametrize("form", FORMS)
def test_published_weights_come_in(form, state, tmp_path):
    source = in_form(form, state, tmp_path)
    fresh = UniViGU(CONFIG)
    assert load_published(fresh, source) is fresh
    assert_same(fresh, state)
    assert published_config(source, round_temb=False, round_time=False) == CONFIG


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_weights_go_out(suffix, dtype, tmp_path):
    """Read back by torch and safetensors themselves: plain tensors under the published keys, no byte to spare."""
    model = make_model(CONFIG).to(dtype)
    path = tmp_path / f"weights{suffix}"
    save_published(model, path)
    got = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)["model"]
    assert_same(model, got, dtype)
    assert path.stat().st_size < 1.2 * sum(v.nbytes for v in got.values()) + 30_000
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_values_take_the_dtype_of_the_model(stored, kept, state):
    values = {key: value.to(stored) for key, value in state.items()}
    assert_same(load_published(UniViGU(CONFIG).to(kept), values), values, kept)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_a_model_without_memory_gets_it(kept, state):
    with torch.device("meta"):
        model = UniViGU(CONFIG).to(kept)
    assert_same(load_published(model, state), state, kept)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_assign_into_a_model_without_memory(stored, state):
    """torch's own way, under the published keys."""
    with torch.device("meta"):
        model = UniViGU(CONFIG)
    model.load_state_dict({key: value.to(stored) for key, value in state.items()}, assign=True)
    assert_same(model, {k: v.to(stored) for k, v in state.items()}, stored)
    velocity, logits = model(*make_inputs(CONFIG, 1, (1, 2, 2), 3, 2))
    assert velocity.isfinite().all() and logits.isfinite().all()


def test_loaded_again_the_result_follows(state):
    """No angle of the text positions outlives the frequencies it was made of."""
    model, inputs = make_model(CONFIG), make_inputs(CONFIG, 1, (1, 2, 2), 5, 2)
    with torch.no_grad():
        before = model(*inputs)
        load_published(model, {k: v * 3 if "inv_freq" in k else v for k, v in state.items()})
        between = model(*inputs)
        load_published(model, state)
        after = model(*inputs)
    assert not torch.equal(before[1], between[1])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_config_that_the_shapes_do_not_tell_is_refused(state):
    for change, rule in (
        ({"vocab_embed.weight": None}, "must hold vocab_embed.weight with 2"),
        ({"patch_embedding.weight": torch.zeros(3, 3)}, "must hold patch_embedding.weight with 5"),
        ({"rotary_emb_text.inv_freq": torch.zeros(0)}, "head_dim must divide the width 64"),
        ({"rotary_emb_text.inv_freq": torch.zeros(5)}, "head_dim must divide the width 64"),
        ({"blocks.12345.x": torch.zeros(1)}, "must number its blocks"),
        ({key: None for key in state if key.startswith("blocks.")}, "blocks.0.ffn.net.0.proj.weight"),
    ):
        changed = {key: value for key, value in {**state, **change}.items() if value is not None}
        with pytest.raises(CheckpointError, match=rule):
            published_config(changed)


# A folder of our own.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, SHARD, 1])
def test_a_folder_comes_back(dtype, shard_bytes, tmp_path):
    model = make_model(make_config(layers=3, round_temb=True, patch=(2, 1, 3))).to(dtype)
    save_pretrained(model, tmp_path / "m", shard_bytes=shard_bytes)
    names = sorted(os.listdir(tmp_path / "m"))
    if shard_bytes == 10**9:
        assert names == ["config.json", "model.safetensors"]
    else:
        assert {"config.json", "model.safetensors.index.json"} < set(names) and len(names) > 4
        largest = max(value.nbytes for value in model.state_dict().values())
        shards = [path for path in (tmp_path / "m").glob("*.safetensors")]
        assert all(sum(v.nbytes for v in load_file(p).values()) <= max(largest, shard_bytes) for p in shards)
    got = from_pretrained(tmp_path / "m")
    assert got.config == model.config
    assert_same(got, model.state_dict(), dtype)
    assert all(p.requires_grad for p in got.parameters())


def test_a_folder_in_another_dtype(model, state, tmp_path):
    model.save_pretrained(tmp_path)
    assert_same(UniViGU.from_pretrained(tmp_path, dtype=torch.bfloat16), state, torch.bfloat16)
    mixed = UniViGU.from_pretrained(tmp_path, compute_dtype=torch.bfloat16)
    assert_same(mixed, state)
    assert mixed.dtype == torch.bfloat16


def test_mixed_dtypes_lose_nothing(model, state, tmp_path):
    save_pretrained(model, tmp_path)
    mixed = {k: v.bfloat16() if "patch" in k or "blocks.0" in k else v for k, v in state.items()}
    save_file(mixed, tmp_path / "model.safetensors")
    assert_same(from_pretrained(tmp_path), mixed)


def test_saving_again_replaces_all_of_it(model, state, tmp_path):
    other = make_model(CONFIG, seed=5)
    for saved, shard_bytes in ((other, SHARD), (model, 10**9), (other, SHARD // 2), (model, SHARD)):
        save_pretrained(saved, tmp_path, shard_bytes=shard_bytes)
        assert_same(from_pretrained(tmp_path), saved.state_dict())
        (tmp_path / "README.md").write_text("not ours")
    assert len(list(tmp_path.glob("*.safetensors"))) == len(set(json.loads(
        (tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values()))  # fmt: skip
    assert (tmp_path / "README.md").is_file()


@pytest.mark.parametrize("shard_bytes", [10**9, SHARD])
def test_a_save_that_fails_leaves_what_was_there(model, state, tmp_path, shard_bytes):
    save_pretrained(model, tmp_path, shard_bytes=shard_bytes)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = make_model(CONFIG, seed=5)
    broken.text_head.to("meta")  # among the last to be written
    with pytest.raises(CheckpointError, match="must have memory to be saved, got text_head"):
        save_pretrained(broken, tmp_path, shard_bytes=shard_bytes)
    for suffix in (".pth", ".safetensors"):
        with pytest.raises(CheckpointError, match="must have memory to be saved"):
            save_published(broken, tmp_path / f"new{suffix}")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_where_it_cannot_be_is_told(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"must end in .safetensors"):
        save_published(model, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="shard_bytes must be at least 1, got 0"):
        save_pretrained(model, tmp_path, shard_bytes=0)
    assert os.listdir(tmp_path) == []


def spoil_config(**changes):
    def spoil(folder):
        path = folder / "config.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return spoil


SPOILT = {
    "no config": (lambda f: (f / "config.json").unlink(), "must hold config.json and one of"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "must hold config.json and one of.*got config.json"),
    "two weights": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "must hold config.json and one of",
    ),
    "config is no json": (lambda f: (f / "config.json").write_text("{"), "config.json must be a json object"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json must be a json object"),
    "config is deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json must be a json object"),
    "other layers": (spoil_config(layers=2), "must have the model's keys, got unexpected"),
    "other width": (spoil_config(heads=4), "must have the model's shapes"),
    "other vocabulary": (spoil_config(vocab=41), "must have the model's shapes, got text_head.linear.bias"),
    "lacks a size": (spoil_config(vocab=None), "missing .'vocab'"),
    "a strange size": (spoil_config(width=3), "unknown .'width'"),
    "a text for a size": (spoil_config(heads="2"), "heads must be a positive integer"),
    "a bad patch": (spoil_config(patch=2), "patch must be three positive integers"),
    "a bad prediction": (spoil_config(prediction="noise"), "prediction must be one of velocity, sample, got 'noise'"),
    "a bad quirk": (spoil_config(round_temb="no"), "round_temb must be true or false"),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 5000), "must be a whole safetensors file"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_folder_is_told(name, model, tmp_path):
    spoil, rule = SPOILT[name]
    save_pretrained(model, tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(ValueError, match=rule):
        from_pretrained(tmp_path / "m")


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"none must hold config.json"):
        from_pretrained(tmp_path / "none")


# What a training run starts from.


@pytest.mark.parametrize("kind", ["published", "pretrained"])
def test_a_run_starts_from_weights(kind, model, state, tmp_path):
    save_pretrained(model, tmp_path)
    fresh = UniViGU(CONFIG)
    assert initial_weights(fresh, f"{kind}:{tmp_path}") is fresh
    assert_same(fresh, state)


def test_a_run_starts_from_its_own_kind_of_model_only(model, tmp_path):
    save_pretrained(model, tmp_path)
    rounded = UniViGU(make_config(layers=3, round_temb=True))
    with pytest.raises(CheckpointError, match=r"must be the model's config, got round_temb False for True"):
        load_pretrained(rounded, tmp_path)
    for init in ("published", "published:", "hub:x", str(tmp_path)):
        with pytest.raises(ValueError, match="init must be KIND:PATH"):
            initial_weights(UniViGU(CONFIG), init)
    untouched = UniViGU(CONFIG)
    before = {key: value.clone() for key, value in untouched.state_dict().items()}
    assert_same(initial_weights(untouched, None), before)

"""Wan2.1 weights in both namings, in and out, against diffusers' own model and its own conversion of names."""

import json
import os
from dataclasses import replace

import pytest
import torch
from dense_model import make_config, make_inputs, make_model, relative
from safetensors.torch import load_file, save_file
from wan_weights import diffusers, original_names, video_velocity, wan_model

from uvg_engine.model import (
    CheckpointError,
    UniViGU,
    load_wan,
    named_config,
    save_pretrained,
    save_wan,
    wan_config,
)

CONFIG = make_config(in_channels=16, layers=3)


@pytest.fixture(scope="module")
def wan():
    return wan_model(CONFIG)


@pytest.fixture(scope="module")
def original(wan):
    return original_names(wan.state_dict())


CASES = {
    "two heads of 32": ({}, (2, 3, 5), 3),
    "one head of 128": ({"heads": 1, "head_dim": 128}, (3, 1, 2), 1),
    "three heads of 64": ({"heads": 3, "head_dim": 64}, (1, 4, 3), 2),
    "odd axes": ({"head_dim": 44}, (5, 2, 7), 1),
    "patch of frames": ({"patch": (2, 1, 3)}, (2, 3, 2), 2),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_without_text_the_velocity_is_that_of_diffusers(name):
    changes, grid, batch = CASES[name]
    config = make_config(in_channels=16, layers=2, **changes)
    wan = wan_model(config)
    ours = load_wan(UniViGU(config), wan.state_dict())
    inputs = make_inputs(config, batch, grid, 4, 5)
    inputs[2][:1] = 1000.0
    want = wan(inputs[0], inputs[2], inputs[4], return_dict=False)[0]
    got = video_velocity(ours, inputs)
    assert got.shape == want.shape and want.std() > 0.1
    assert relative(got, want) < 1e-5


@torch.no_grad()
def test_bf16_weights_are_near_diffusers_in_fp32(wan):
    inputs = make_inputs(CONFIG, 1, (2, 3, 5), 0, 5)
    want = wan(inputs[0], inputs[2], inputs[4], return_dict=False)[0]
    ours = load_wan(UniViGU(CONFIG).to(torch.bfloat16), wan.state_dict())
    assert 1e-4 < relative(video_velocity(ours, inputs), want) < 3e-2


def in_form(form, state, folder):
    """The weights in the forms that Wan2.1 is handed out in."""
    state = {key: value.contiguous().clone() for key, value in state.items()}
    if form == "mapping":
        return state
    if form == "prefixed":
        state = {f"model.diffusion_model.{key}": value for key, value in state.items()}
    if form in ("file", "prefixed"):
        save_file(state, folder / "a.safetensors")
        return folder / "a.safetensors"
    if form == "pth":
        torch.save(state, folder / "a.pth")
        return folder / "a.pth"
    place = folder / "transformer" if form == "pipeline" else folder
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text("{}")
    if form == "pipeline":
        (folder / "model_index.json").write_text("{}")
    else:
        torch.save({"vae": torch.zeros(3)}, folder / "Wan2.1_VAE.pth")
    stem = place / "diffusion_pytorch_model"
    if form == "folder":
        save_file(state, f"{stem}.safetensors")
        return str(folder)
    places = {}
    for part in range(3):
        name = f"{stem.name}-0000{part + 1}-of-00003.safetensors"
        shard = {key: state[key] for key in sorted(state)[part::3]}
        save_file(shard, place / name)
        places |= dict.fromkeys(shard, name)
    index = place / f"{stem.name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index if form == "index" else folder


FORMS = ["mapping", "prefixed", "file", "pth", "folder", "sharded folder", "index", "pipeline"]


@pytest.mark.parametrize("naming", ["diffusers", "original"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_naming_gives_the_same_model(form, naming, wan, original, tmp_path):
    source = in_form(form, wan.state_dict() if naming == "diffusers" else original, tmp_path)
    with torch.device("meta"):
        model, other = UniViGU(CONFIG), UniViGU(CONFIG)
    torch.manual_seed(3)
    want = load_wan(other, wan.state_dict()).state_dict()
    torch.manual_seed(3)
    got = load_wan(model, source).state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert wan_config(source, vocab=40, head_dim=32) == CONFIG


def test_the_config_of_wan_itself():
    """From the shapes alone, with the head width that every Wan2.1 has."""
    config = named_config("1.3b", layers=2)
    with torch.device("meta"):
        shapes = wan_model_on_meta(config).state_dict()
    stored = {key: torch.empty(1).expand(value.shape) for key, value in shapes.items()}
    assert wan_config(stored, vocab=config.vocab) == config
    assert wan_config(stored, vocab=9, round_temb=True) == named_config("1.3b", layers=2, vocab=9, round_temb=True)


@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_a_folders_config_tells_the_width_of_a_head(naming, tmp_path):
    """The shapes fit heads of 128 as well as those of 64."""
    config, wide = (replace(CONFIG, heads=256 // width, head_dim=width) for width in (64, 128))
    save_wan(make_model(config), tmp_path, naming)
    assert wan_config(tmp_path, vocab=40) == config
    assert wan_config(tmp_path, vocab=40, head_dim=128) == wide
    with pytest.raises(CheckpointError, match=r"head_dim must be 64 by the config.json of .*, got 128"):
        load_wan(UniViGU(wide), tmp_path)
    load_wan(UniViGU(config), tmp_path)
    for text in ('{"attention_head_dim": "wide"}', '{"dim": 4, "num_heads": 0}', "7", "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config.json must be the json of a Wan2.1 transformer, got "):
            wan_config(tmp_path, vocab=40)
    (tmp_path / "config.json").write_text("{}")
    assert wan_config(tmp_path, vocab=40) == wide


def wan_model_on_meta(config):
    return diffusers.WanTransformer3DModel(
        num_attention_heads=config.heads, ffn_dim=config.ffn_dim, num_layers=config.layers, freq_dim=config.freq_dim
    )


@pytest.mark.parametrize("name", ["1.3b", "14b"])
def test_the_video_part_has_the_size_of_wan(name):
    config = named_config(name)
    with torch.device("meta"):
        ours, theirs = UniViGU(config).state_dict(), wan_model_on_meta(config)
    text = ("ffn_t", "time_embedding_t", "scale_shift_table_t", "text_head", "vocab_embed", "rotary_emb_text")
    video = {key: value for key, value in ours.items() if not any(part in key for part in text)}
    assert sum(v.numel() for v in video.values()) == sum(p.numel() for p in theirs.parameters())
    assert len(video) == len(theirs.state_dict())


# Out again.


def test_out_under_the_names_of_diffusers(wan, tmp_path):
    model = load_wan(UniViGU(CONFIG), wan.state_dict())
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pth"):
        save_wan(model, path)
        got = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        want = wan.state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
        assert path.stat().st_size < 1.1 * sum(v.nbytes for v in got.values()) + 30_000, "the text expert stays behind"


def test_out_under_the_original_names(wan, original, tmp_path):
    model = load_wan(UniViGU(CONFIG), wan.state_dict())
    save_wan(model, tmp_path / "a.safetensors", "original")
    got = load_file(tmp_path / "a.safetensors")
    assert got.keys() == original.keys() and all(torch.equal(got[key], original[key]) for key in original)
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted = convert_wan_transformer_to_diffusers(dict(got))
    want = wan.state_dict()
    assert converted.keys() == want.keys() and all(torch.equal(converted[key], want[key]) for key in want)


@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
@torch.no_grad()
def test_diffusers_opens_our_folder(wan, shard_bytes, tmp_path):
    save_wan(load_wan(UniViGU(CONFIG), wan.state_dict()), tmp_path, shard_bytes=shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, local_files_only=True)
    want = wan.state_dict()
    assert all(torch.equal(value, want[key]) for key, value in theirs.state_dict().items())
    for key, value in wan.config.items():
        assert key.startswith("_") or theirs.config[key] == (list(value) if isinstance(value, tuple) else value), key


@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_there_and_back(naming, tmp_path):
    model = make_model(CONFIG)
    save_wan(model, tmp_path / naming, naming, shard_bytes=50_000)
    assert json.loads((tmp_path / naming / "config.json").read_text())["num_layers"] == 3
    got = load_wan(UniViGU(CONFIG), tmp_path / naming).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(got[key], value) or any(
            part in key for part in ("_t.", "table_t", "text_head", "vocab_embed")
        )


def test_another_naming_is_told(tmp_path):
    with pytest.raises(ValueError, match="naming must be one of diffusers, original, got 'gguf'"):
        save_wan(make_model(CONFIG), tmp_path / "a.safetensors", "gguf")
    assert os.listdir(tmp_path) == []


# What is not Wan2.1 text-to-video.


BIAS = torch.zeros(64)


def put(**values):
    return lambda state: state.update({key.replace("__", "."): value for key, value in values.items()})


def drop(start):
    return lambda state: [state.pop(key) for key in list(state) if key.startswith(start)]


def rename(old, new):
    return lambda state: state.update({new: state.pop(old)})


IMAGE = {"condition_embedder.image_embedder.norm1.weight": BIAS, "blocks.0.attn2.add_k_proj.bias": BIAS}
WRONG = {
    "image to video": ("diffusers", lambda s: s.update(IMAGE), r"unexpected 2 \(blocks.0.attn2.add_k_proj.bias, cond"),
    "missing": ("original", drop("blocks.1.norm3.bias"), r"missing 1 \(blocks.1.norm3.bias\)"),
    "our name in the original": (
        "original",
        rename("blocks.1.norm3.bias", "blocks.1.norm2.bias"),
        r"missing 1 \(blocks.1.norm3.bias\), unexpected 1 \(blocks.1.norm2.bias\)",
    ),
    "our name beside theirs": ("diffusers", put(scale_shift_table_v=BIAS), r"unexpected 1 \(scale_shift_table_v\)"),
    "shape": ("original", put(head__head__bias=torch.zeros(3)), r"shapes, got video_head.proj_out.bias \(3,\)"),
    "channels": ("diffusers", put(patch_embedding__weight=torch.zeros(64, 36, 1, 2, 2)), r"patch_embedding.*\(64, 36"),
    "fewer blocks": ("diffusers", drop("blocks.2."), r"missing 27 \(blocks.2"),
    "more blocks": (
        "diffusers",
        lambda s: s.update({key.replace("s.2.", "s.3."): value for key, value in s.items()}),
        r"unexpected 27 \(blocks.3",
    ),
    "no blocks": ("diffusers", drop("blocks."), r"missing 81 \(blocks.0"),
    "integers": ("diffusers", put(proj_out__bias=BIAS.to(torch.int8)), "dtypes.*int8"),
    "twice": ("original", put(model__diffusion_model__head__head__bias=BIAS), "head.head.bias once"),
    "odd names": ("diffusers", put(blocks__=BIAS, blocks__x=BIAS), r"unexpected 2 \(blocks., blocks.x\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_wan_is_told_and_changes_nothing(name, wan, original, tmp_path):
    naming, change, rule = WRONG[name]
    state = dict(wan.state_dict() if naming == "diffusers" else original)
    change(state)
    model = UniViGU(CONFIG)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rule):
        load_wan(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_config_of_what_is_not_wan_is_told(wan, tmp_path):
    save_pretrained(make_model(CONFIG), tmp_path)
    for state in ({"a": torch.zeros(3)}, tmp_path):  # the second has the published names
        for call in (lambda s=state: wan_config(s, vocab=40), lambda s=state: load_wan(UniViGU(CONFIG), s)):
            with pytest.raises(CheckpointError, match=r"must be Wan2.1 T2V in diffusers' or the original names, got "):
                call()
    with pytest.raises(CheckpointError, match="head_dim must divide the width 64 of state dict, got 128"):
        wan_config(wan.state_dict(), vocab=40)
    lone = {"condition_embedder.time_proj.bias": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"must hold patch_embedding.weight with 5 dimensions, got no"):
        wan_config(lone, vocab=40)

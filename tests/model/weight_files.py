"""The weights of a small model in the forms that they come in, written by torch and safetensors alone."""

import json

import torch
from safetensors.torch import save_file


def assert_same(model, state, dtype=torch.float32):
    got = model.state_dict()
    assert got.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(got[key], value.to(got[key].dtype)), key
        assert got[key].dtype == (torch.float32 if "inv_freq" in key else dtype), key


def write_sharded(state, folder, suffix=".safetensors", parts=3):
    """Shards and index as huggingface_hub writes them, by other means than ours."""
    folder.mkdir(exist_ok=True)
    keys, places = sorted(state), {}
    for part in range(parts):
        name = f"shard-{part}{suffix}"
        shard = {key: state[key].contiguous().clone() for key in keys[part::parts]}
        places |= dict.fromkeys(shard, name)
        save_file(shard, folder / name) if suffix == ".safetensors" else torch.save(shard, folder / name)
    index = folder / "weights.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def in_form(form, state, folder):
    """The state in one of the forms that `load_published` takes."""
    if form == "mapping":
        return state
    if form == "nested":
        return {"model": state, "step": 7}
    if form == "wrapped":
        return {f"_fsdp_wrapped_module.{k.replace('blocks.1.', 'blocks.1._orig_mod.')}": v for k, v in state.items()}
    if form == "safetensors":
        save_file({k: v.clone() for k, v in state.items()}, folder / "a.safetensors")
        return folder / "a.safetensors"
    if form in ("pth", "old pth", "bare pt"):
        path = folder / f"a{form[-4:].strip()}.pth" if "pth" in form else folder / "a.pt"
        held = state if form == "bare pt" else {"model": state, "epoch": 3}
        torch.save(held, path, _use_new_zipfile_serialization=form != "old pth")
        return path
    index = write_sharded(state, folder / "shards", ".bin" if "bin" in form else ".safetensors")
    return str(index.parent) if form == "folder" else str(index)

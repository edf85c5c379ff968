"""Small Wan2.1 models by diffusers, and their weights under the original names."""

from itertools import product

import pytest
import torch

diffusers = pytest.importorskip("diffusers")  # without it, what imports this is skipped


def wan_model(config, seed=0):
    """diffusers' transformer with no zero in it: random weights of the scale of their fan-in."""
    model = diffusers.WanTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.layers,
    )
    gen = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=gen)
        if "norm" in key and key.endswith("weight"):
            value.copy_(1 + 0.2 * noise)
        else:
            value.copy_(noise * (value[0].numel() ** -0.5 if key.endswith("weight") else 0.3))
    return model.eval()


def original_names(state):
    """The weights of diffusers under the original names."""
    tops = {"patch_embedding": "patch_embedding", "proj_out": "head.head"}
    tops["condition_embedder.time_proj"] = "time_projection.1"
    for kind, linear in product(("time", "text"), (1, 2)):
        tops[f"condition_embedder.{kind}_embedder.linear_{linear}"] = f"{kind}_embedding.{2 * linear - 2}"
    inner = {"norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        inner |= {f"{ours}.to_{letter}": f"{theirs}.{letter}" for letter in "qkv"}
        inner |= {f"{ours}.norm_{letter}": f"{theirs}.norm_{letter}" for letter in "qk"}
        inner[f"{ours}.to_out.0"] = f"{theirs}.o"
    named = {}
    for key, value in state.items():
        if key == "scale_shift_table":
            named["head.modulation"] = value
        elif key.endswith("scale_shift_table"):
            named[key.replace("scale_shift_table", "modulation")] = value
        elif key.startswith("blocks."):
            place, kind = key[: key.index(".", 7) + 1], key[key.rindex(".") :]
            named[place + inner[key[len(place) : -len(kind)]] + kind] = value
        else:
            stem, _, kind = key.rpartition(".")
            named[f"{tops[stem]}.{kind}"] = value
    return named


def video_velocity(model, inputs):
    """The model's velocity with text absent."""
    x_v, _, time_v, time_t, cond = inputs
    with torch.no_grad():
        return model(x_v, torch.zeros(len(x_v), 0, dtype=torch.int64), time_v, time_t, cond)[0]

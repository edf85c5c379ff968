"""The text parts are born from the video parts, and the video does not notice."""

import pytest
import torch
from dense_model import make_config, make_inputs, make_model, relative
from wan_weights import video_velocity, wan_model

from uvg_engine.model import UniViGU, load_wan, text_from_video
from uvg_engine.training.initial import initial_weights

CONFIG = make_config(in_channels=16, layers=3)
FFN = ("net.0.proj.weight", "net.0.proj.bias", "net.2.weight", "net.2.bias")


@pytest.fixture(scope="module")
def wan():
    return wan_model(CONFIG)


@pytest.mark.parametrize("start", ["wan", "fresh model", "no memory", "text_from_video"])
def test_the_text_parts_start_as_the_video_parts(start, wan):
    model = make_model(CONFIG, seed=4)  # text parts of an earlier life
    if start == "fresh model":
        model = UniViGU(CONFIG)
    elif start == "no memory":
        with torch.device("meta"):
            model = UniViGU(CONFIG)
    if start == "text_from_video":
        assert text_from_video(model) is model
    else:
        load_wan(model, wan.state_dict())
    state = model.state_dict()
    for layer in range(CONFIG.layers):
        for key in FFN:
            assert torch.equal(state[f"blocks.{layer}.ffn_t.{key}"], state[f"blocks.{layer}.ffn.{key}"])
    for key in (key for key in state if key.startswith("time_embedding_t.")):
        assert torch.equal(state[key], state[key.replace("_t.", "_v.", 1)])
    assert torch.equal(state["scale_shift_table_t"], state["scale_shift_table_v"])
    assert not state["text_head.linear.weight"].any() and not state["text_head.linear.bias"].any()
    assert torch.equal(state["text_head.norm_final.weight"], torch.ones(CONFIG.dim))
    embedding = state["vocab_embed.weight"]
    assert embedding.std().item() == pytest.approx(0.02, rel=0.1) and abs(embedding.mean().item()) < 2e-3
    fresh = UniViGU(CONFIG)
    assert torch.equal(state["rotary_emb_text.inv_freq"], fresh.rotary_emb_text.inv_freq)
    with torch.no_grad():
        logits = model(*make_inputs(CONFIG, 2, (1, 2, 2), 5, 3))[1]
    assert logits.shape == (2, 5, 40) and not logits.any(), "every token is as likely as another"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_making_the_text_parts_leaves_the_video_as_it_was(dtype):
    """With text absent, bitwise: no text part is read. And no video part is written."""
    model = make_model(CONFIG).to(dtype)
    inputs = make_inputs(CONFIG, 2, (2, 3, 5), 0, 4)
    before = video_velocity(model, inputs)
    copies = {key: value.clone() for key, value in model.state_dict().items()}
    text_from_video(model)
    assert torch.equal(video_velocity(model, inputs), before)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, copies[key])}
    names = ("ffn_t.", "time_embedding_t.", "scale_shift_table_t", "text_head.", "vocab_embed.")
    assert changed and all(any(name in key for name in names) for key in changed)


@torch.no_grad()
def test_text_that_nothing_may_see_is_absent(wan):
    model = load_wan(UniViGU(CONFIG), wan.state_dict())
    inputs = make_inputs(CONFIG, 2, (2, 3, 5), 6, 4)
    hidden = model(*inputs, torch.zeros(2, 6, dtype=torch.bool))[0]
    assert relative(hidden, video_velocity(model, inputs)) < 1e-6
    assert relative(model(*inputs)[0], hidden) > 1e-3, "text that is seen is not nothing"


def test_the_embedding_follows_the_seed(wan):
    def drawn(seed):
        torch.manual_seed(seed)
        return load_wan(UniViGU(CONFIG), wan.state_dict()).vocab_embed.weight

    one, again, two = drawn(0), drawn(0), drawn(1)
    assert torch.equal(one, again) and not torch.equal(one, two)


def test_training_starts_from_wan(wan, tmp_path):
    wan.save_pretrained(tmp_path)
    model = initial_weights(UniViGU(CONFIG), f"wan:{tmp_path}")
    inputs = make_inputs(CONFIG, 1, (2, 2, 2), 0, 4)
    with torch.no_grad():
        want = wan(inputs[0], inputs[2], inputs[4], return_dict=False)[0]
    assert relative(video_velocity(model, inputs), want) < 1e-5
    out = model(*make_inputs(CONFIG, 1, (2, 2, 2), 3, 4))
    sum(each.square().mean() for each in out).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

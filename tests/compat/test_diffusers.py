"""diffusers' Wan transformer on our ops is what it was: results, gradients, names; what would be ignored is refused."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed, WanTransformerBlock

from uvg_engine.backends import native, packed_weights
from uvg_engine.compat.diffusers import accelerate, restore

CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def model(**given):
    torch.manual_seed(0)
    made = WanTransformer3DModel(**(CONFIG | given)).eval()
    for parameter in made.parameters():  # norms and modulations count too
        nn.init.normal_(parameter, std=0.2)
    return made


def inputs(samples=2, image=None):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(samples, 4, 3, 6, 8, generator=generator)
    text = torch.randn(samples, 512 if image else 7, 20, generator=generator)
    given = {"hidden_states": latents, "encoder_hidden_states": text, "timestep": torch.tensor([3.0, 700.0][:samples])}
    if image:
        given["encoder_hidden_states_image"] = torch.randn(samples, 5, image, generator=generator)
    return given


def by_rows(given):
    """The same with a time for every row, as Wan2.2's 5B model is called."""
    times = torch.rand(2, 3 * 3 * 4, generator=torch.Generator().manual_seed(2)) * 1000
    return given | {"timestep": times}


def apart(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


CASES = {
    "plain": ({}, inputs()),
    "alone": ({}, inputs(1)),
    "no norm before the condition": ({"cross_attn_norm": False}, inputs()),
    "a time for every row": ({}, by_rows(inputs())),
    "image": ({"added_kv_proj_dim": 48, "image_dim": 24}, inputs(image=24)),
}


@pytest.mark.parametrize("config, given", CASES.values(), ids=CASES)
def test_results_and_gradients_are_those_of_diffusers(config, given):
    plain = model(**config)
    ours = accelerate(copy.deepcopy(plain))
    results = []
    for each in (ours, plain):
        latents = given["hidden_states"].clone().requires_grad_()
        out = each(**given | {"hidden_states": latents}).sample
        out.square().mean().backward()
        results.append({"out": out.detach(), "latents": latents.grad})
        results[-1] |= {name: parameter.grad for name, parameter in each.named_parameters()}
    for name, theirs in results[1].items():
        mine = results[0][name]
        if theirs is None:
            assert mine is None, name
        elif theirs.norm() < 1e-6:  # a key's bias moves no softmax: rounding alone
            assert mine.norm() < 1e-6, name
        else:
            assert apart(mine, theirs) < 2e-5, name


def test_in_bf16_it_is_as_near_to_the_truth_as_diffusers():
    truth, given = model(), inputs()
    plain = copy.deepcopy(truth).bfloat16()
    exact = {name: value.double() for name, value in given.items()}
    rounded = {name: value.bfloat16() for name, value in given.items()}
    with torch.no_grad():
        true = truth.double()(**exact).sample
        theirs = apart(plain(**rounded).sample.double(), true)
        ours = apart(accelerate(plain)(**rounded).sample.double(), true)
    assert ours < 2 * theirs


def test_a_block_gives_a_sample_the_bits_that_it_has_alone():
    ours = accelerate(model())
    h, cond, temb = (torch.randn(2, *shape) for shape in ((36, 48), (7, 48), (6, 48)))
    latents = inputs()["hidden_states"]
    with torch.no_grad():
        both = ours.blocks[0](h, cond, temb, ours.rope(latents))
        one = ours.blocks[0](h[1:], cond[1:], temb[1:], ours.rope(latents[1:]))
    assert torch.equal(both[1:], one)


def test_it_can_be_undone_and_done_twice_and_names_stay():
    given, ours = inputs(), model()
    names = list(ours.state_dict())
    with torch.no_grad():
        before = ours(**given).sample
        after = accelerate(accelerate(ours))(**given).sample
        assert not torch.equal(before, after) and list(ours.state_dict()) == names  # other kernels, other rounding
        assert torch.equal(restore(ours)(**given).sample, before)


def test_layers_that_are_more_than_their_weight_are_called():
    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    plain, given = model(), inputs()
    for name in ("attn1.to_q", "attn1.to_out.0", "attn2.to_v", "ffn.net.0.proj"):
        layer = plain.blocks[0].get_submodule(name)
        layer.__class__ = Halved
    plain.blocks[1].attn2.to_q.register_forward_hook(lambda module, args, out: out * 3)
    with torch.no_grad():
        theirs = plain(**given).sample
        ours = accelerate(plain)(**given).sample
    assert apart(ours, theirs) < 2e-5


def test_gradient_checkpointing_changes_no_gradient():
    ours, given = accelerate(model()).train(), inputs()
    found = []
    for turn_on in (False, True):
        if turn_on:
            ours.enable_gradient_checkpointing()
        ours.zero_grad()
        ours(**given).sample.square().mean().backward()
        found.append(ours.blocks[0].attn1.to_q.weight.grad.clone())
    assert torch.equal(*found)


def test_blocks_compile_without_a_break_to_the_same_bits():
    ours, given = accelerate(model()), inputs()
    with torch.no_grad():
        before = ours(**given).sample
        for block in ours.blocks:
            block.compile(fullgraph=True, backend="eager")
        assert torch.equal(ours(**given).sample, before)


def with_processor(made):
    class Own(WanAttnProcessor):
        pass

    made.blocks[1].attn1.set_processor(Own())


def with_backend(made):
    made.blocks[0].attn2.processor._attention_backend = "native"


def fused(made):
    made.blocks[0].attn1.fuse_projections()


def hooked(made):
    made.blocks[1].attn2.register_forward_hook(lambda module, args, out: out * 2)


def hooked_ffn(made):
    made.blocks[0].ffn.forward = lambda x: x


@pytest.mark.parametrize(
    "change, told",
    [
        (hooked, "attn2 must have no hooks and its own forward, got WanAttention"),
        (hooked_ffn, "ffn must have no hooks and its own forward, got FeedForward"),
        (with_processor, "an attention must have diffusers' processor, without a backend of its own, got Own"),
        (with_backend, "an attention must have diffusers' processor, without a backend of its own"),
        (fused, "projections must not be fused, got True"),
    ],
)
def test_what_would_be_ignored_is_refused_when_it_is_called(change, told):
    ours = accelerate(model())
    change(ours)
    with pytest.raises(ValueError, match=told):
        ours(**inputs())
    with torch.no_grad():
        assert restore(ours)(**inputs()).sample.isfinite().all()


def test_other_models_and_dropout_are_refused():
    with pytest.raises(ValueError, match="transformer must be a WanTransformer3DModel, got Linear"):
        accelerate(nn.Linear(2, 2))
    made = model()
    made.blocks[0].attn1.to_out[1].p = 0.5
    with pytest.raises(ValueError, match=r"dropout must be 0, got 0\.5"):
        accelerate(made)


def test_saved_weights_are_read_by_diffusers(tmp_path):
    ours, given = accelerate(model()), inputs()
    ours.save_pretrained(tmp_path)
    with torch.no_grad():
        again = accelerate(WanTransformer3DModel.from_pretrained(tmp_path))(**given).sample
        assert torch.equal(again, ours(**given).sample)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_as_near_to_the_truth_as_diffusers(weights):
    truth, given = model(), inputs()
    with torch.no_grad():
        true = truth(**given).sample
        plain = truth.to(weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = plain(**given).sample
            ours = accelerate(plain)(**given).sample
    assert ours.dtype == theirs.dtype and apart(ours, true) < 2 * apart(theirs, true)


def test_gradients_under_autocast_are_those_of_diffusers():
    found, given = [], inputs()
    for each in (accelerate(model()), model()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = each(**given).sample
        out.float().square().mean().backward()
        found.append(each.blocks[0].attn1.to_q.weight.grad)
    assert found[0].dtype == torch.float32 and apart(*found) < 0.05


def test_repeated_blocks_compile_by_their_name():
    ours, given = accelerate(model()), inputs()
    with torch.no_grad():
        before = ours(**given).sample
        ours.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert all(block._compiled_call_impl is not None for block in ours.blocks)
        assert torch.equal(ours(**given).sample, before)


def test_it_can_be_pickled():
    ours, given = accelerate(model()), inputs()
    again = pickle.loads(pickle.dumps(ours))
    with torch.no_grad():
        assert torch.equal(again(**given).sample, ours(**given).sample)


def test_a_cache_of_blocks_is_turned_on_afterwards():
    hooks = pytest.importorskip("diffusers.hooks")
    if not hasattr(hooks, "FirstBlockCacheConfig"):
        pytest.skip("a diffusers without this cache")
    given, found = inputs(), []
    others = given | {"hidden_states": 1.01 * given["hidden_states"]}
    for each in (accelerate(model()), model()):
        each.enable_cache(hooks.FirstBlockCacheConfig(threshold=10.0))
        with torch.no_grad(), each.cache_context("cond"):
            found.append([each(**call).sample for call in (given, others)])
    for mine, theirs in zip(*found, strict=True):
        assert apart(mine, theirs) < 2e-5
    with torch.no_grad():
        assert apart(found[0][1], accelerate(model())(**others).sample) > 1e-4  # the second block was not computed

    ours = model()
    ours.enable_cache(hooks.FirstBlockCacheConfig(threshold=10.0))
    with pytest.raises(ValueError, match=r"transformer\.blocks\.0 must have its own forward, got partial"):
        accelerate(ours)
    assert {type(block) for block in ours.blocks} == {WanTransformerBlock}
    ours.disable_cache()
    accelerate(ours).enable_cache(hooks.FirstBlockCacheConfig(threshold=10.0))
    with pytest.raises(ValueError, match=r"transformer\.blocks\.0 must have its own forward, got partial"):
        restore(ours)


@pytest.mark.parametrize("before", [True, False])
def test_a_hook_that_was_removed_leaves_nothing(before):
    given, ours = inputs(), model()
    want = accelerate(model())
    if not before:
        accelerate(ours)
    for name in ("attn1", "attn2.norm_q", "attn1.to_q", "attn1.to_out.1", "norm1", "ffn", "ffn.net.0.proj", ""):
        registry = HookRegistry.check_if_exists_or_initialize(ours.blocks[1].get_submodule(name))
        registry.register_hook(ModelHook(), "own")
        registry.remove_hook("own", recurse=False)
    assert "forward" in vars(ours.blocks[1].attn1)
    with torch.no_grad():
        assert torch.equal(accelerate(ours)(**given).sample, want(**given).sample)


class OwnRope(WanRotaryPosEmbed):
    pass


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda rope: setattr(rope, "__class__", OwnRope), "must be WanRotaryPosEmbed, got OwnRope"),
        (lambda rope: setattr(rope, "forward", rope.forward.__func__), "must have no hooks and its own forward"),
        (lambda rope: rope.register_forward_hook(lambda *call: None), "must have no hooks and its own forward"),
    ],
)
def test_rotations_of_its_own_are_refused(change, told):
    made = model()
    change(made.rope)
    with pytest.raises(ValueError, match=rf"transformer\.rope {told}"):
        accelerate(made)
    assert type(made.blocks[0]) is WanTransformerBlock


def test_a_block_is_given_what_the_accelerated_rope_gives():
    ours = accelerate(model())
    theirs = WanRotaryPosEmbed.forward(ours.rope, inputs()["hidden_states"])
    with pytest.raises(ValueError, match="rotary_emb must be what the accelerated rope gives, got tuple"):
        ours.blocks[0](torch.zeros(2, 36, 48), torch.zeros(2, 7, 48), torch.zeros(2, 6, 48), theirs)


def test_restore_leaves_what_it_did_not_turn():
    class Own(WanTransformerBlock):
        pass

    made = model()
    made.blocks[0].__class__ = Own
    assert type(restore(made).blocks[0]) is Own
    with pytest.raises(ValueError, match="transformer must be a WanTransformer3DModel, got Linear"):
        restore(nn.Linear(2, 2))


def test_positions_beyond_the_rotations_are_refused_on_every_device():
    """On a GPU nobody else would: the op would have to read its spans back."""
    with pytest.raises(ValueError, match=r"latents must have at most 32 patches along an axis, got \[1, 1, 33\]"):
        accelerate(model()).rope(torch.zeros(1, 4, 1, 2, 66, device="meta"))


def test_undone_it_keeps_no_packed_weights():
    gc.collect()  # of what other tests left
    before, ours = packed_weights.kept_bytes(), accelerate(model())
    with torch.no_grad():
        ours(**inputs())
    assert packed_weights.kept_bytes() > before or native.cpu() is None
    restore(ours)
    assert packed_weights.kept_bytes() == before

"""diffusers' Wan transformer on our ops with layers that were put in place of its own: adapters (LoRA), quantised
weights. They count as they do without us, or the model is refused."""

import pytest
import torch
from test_diffusers import apart, inputs, model
from torch import nn

from uvg_engine.compat.diffusers import accelerate

PROJECTIONS = ("attn1.to_q", "attn1.to_v", "attn1.to_out.0", "attn2.to_k", "ffn.net.0.proj", "ffn.net.2")


class Lora(nn.Module):
    """What peft puts in a layer's place: it holds the layer, gives its weight as its own, and adds to its results."""

    def __init__(self, base, dropout=0.0, width=3):
        super().__init__()
        self.base_layer, self.lora_dropout = base, nn.Dropout(dropout)
        self.lora_A = nn.Linear(base.in_features, width, bias=False)
        self.lora_B = nn.Linear(width, base.out_features, bias=False)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(self.lora_dropout(x)))


class Int8(nn.Linear):
    """As bitsandbytes has it: a Linear whose weight is whole numbers, that only its own forward can read."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.scale = base.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((base.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = base.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Tagged(torch.Tensor):
    """As torchao has it: a plain nn.Linear whose weight is a tensor of a type of its own, which knows the product."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not nn.functional.linear:
            return super().__torch_function__(function, types, args, kwargs)
        plain = [x.as_subclass(torch.Tensor) if isinstance(x, Tagged) else x for x in args]
        return 2 * function(*plain, **(kwargs or {}))


def tagged(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Tagged))
    return layer


def replace(made, names, by):
    torch.manual_seed(3)
    for name in names:
        parent, _, last = name.rpartition(".")
        block = made.blocks[0]
        setattr(block.get_submodule(parent), last, by(block.get_submodule(name)))
    return made


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("before", [True, False])
def test_lora_counts_and_is_trained(before, dropout):
    given, found = inputs(), []
    for ours in (True, False):
        made = model()
        if ours and not before:
            accelerate(made)
        replace(made, PROJECTIONS, lambda layer: Lora(layer, dropout))
        if ours and before:
            accelerate(made)
        out = made(**given).sample
        out.square().mean().backward()
        grads = {name: p.grad for name, p in made.named_parameters() if "lora" in name}
        assert len(grads) == 2 * len(PROJECTIONS)
        found.append({"out": out.detach()} | grads)
    for name, theirs in found[1].items():
        assert apart(found[0][name], theirs) < 2e-5, name
    assert apart(found[0]["out"], model()(**given).sample) > 1e-3  # it has its effect


@pytest.mark.parametrize("by", [Int8, tagged])
def test_quantised_layers_are_called(by):
    plain, given = replace(model(), PROJECTIONS, by), inputs()
    with torch.no_grad():
        theirs = plain(**given).sample
        ours = accelerate(plain)(**given).sample
    assert apart(ours, theirs) < 2e-5 and apart(ours, model()(**given).sample) > 1e-4


class Norm(nn.Module):
    """An adapter of a norm, as peft's for LN tuning."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)
    eps = property(lambda self: self.base_layer.eps)

    def forward(self, *args):
        return 2 * self.base_layer(*args)


@pytest.mark.parametrize("name", ["norm1", "norm2", "norm3", "attn1.norm_q", "attn2.norm_k", "attn1", "ffn"])
def test_what_stands_in_a_place_that_is_not_called_is_refused_by_name(name):
    given, made = inputs(), accelerate(model())
    replace(made, [name], Norm)
    with pytest.raises(ValueError, match=f"{name.rpartition('.')[2]} must be .*, got Norm"):
        made(**given)


@pytest.mark.parametrize("name", ["ffn.net.0", "ffn.net.1", "attn1.to_out.1", "attn2.to_out.1"])
def test_activations_and_dropouts_are_diffusers_own(name):
    """They are not called either."""
    what = r"ffn\.net\[0\]" if name == "ffn.net.0" else "dropout"
    given, made = inputs(), accelerate(model())
    hook = made.blocks[1].get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match=f"{what} must have no hooks and its own forward"):
        made(**given)
    hook.remove()
    replace(made, [name], Norm)
    with pytest.raises(ValueError, match=f"{what} must be .*, got Norm"):
        made(**given)


def test_dropout_is_refused_where_it_would_be_ignored():
    for name in ("attn1.to_out.1", "attn2.to_out.1", "ffn.net.1"):
        made, ours = model(), accelerate(model())
        for one in (made, ours):
            one.blocks[1].get_submodule(name).p = 0.25
        with pytest.raises(ValueError, match=r"dropout must be 0, got 0\.25"):
            accelerate(made)
        with pytest.raises(ValueError, match=r"dropout must be 0, got 0\.25"):
            ours(**inputs())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_peft_itself(dropout, tmp_path):
    peft = pytest.importorskip("peft")
    given, found = inputs(), []
    for ours in (True, False):
        made = model()
        config = peft.LoraConfig(
            r=3, lora_alpha=6, lora_dropout=dropout, init_lora_weights=False,
            target_modules=["to_q", "to_v", "to_out.0", "net.2"],
        )  # fmt: skip
        torch.manual_seed(5)
        made.add_adapter(config)
        if ours:
            accelerate(made)
        out = made(**given).sample
        out.square().mean().backward()
        made.disable_adapters()
        found.append({"out": out.detach(), "without": made(**given).sample.detach()})
        found[-1] |= {name: p.grad for name, p in made.named_parameters() if "lora" in name}
    assert len(found[0]) > 10
    for name, theirs in found[1].items():
        assert apart(found[0][name], theirs) < 2e-5, name
    assert apart(found[0]["out"], found[0]["without"]) > 1e-3

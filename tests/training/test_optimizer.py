"""Muon: the orthogonal update, which parameters take it, and that the rest is AdamW."""

import copy

import pytest
import torch
from tiny_run import assert_same_run, stage, tiny, trained

from uvg_engine.training.loop import Trainer
from uvg_engine.training.optimizer import Muon, make_optimizer, orthogonalize


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_singular_vectors_stay_and_values_become_one(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonalize(x) @ vh.mT
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    assert ((0.6 < diagonal) & (diagonal < 1.3)).all()
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 0.05


def test_size_of_x_does_not_matter_and_zeros_stay():
    x = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(orthogonalize(2.0**-20 * x), orthogonalize(x))
    assert not orthogonalize(torch.zeros(2, 8, 24)).any()


def test_stacks_are_their_matrices_one_by_one():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 8, 16))
    single = [torch.nn.Parameter(m.clone()) for m in stack]
    grads = torch.randn(4, 3, 8, 16)
    groups = [{"params": params, "orthogonal": True, "weight_decay": 0.1} for params in ([stack], single)]
    plain = {"params": [torch.nn.Parameter(torch.ones(2))]}
    for group, leaves in zip(groups, ([stack], single), strict=True):
        muon = Muon([plain, group], 1e-2, (0.9, 0.95))
        for grad in grads:
            for leaf, part in zip(leaves, grad[None] if leaves[0] is stack else grad, strict=True):
                leaf.grad = part.clone()
            muon.step()
    torch.testing.assert_close(stack, torch.stack(single), rtol=0, atol=1e-4)


def test_an_update_is_as_large_as_adamws_and_follows_the_rate():
    weight = torch.nn.Parameter(torch.zeros(64, 128))
    hidden = {"params": [weight], "orthogonal": True, "weight_decay": 0.0}
    muon = Muon([{"params": [torch.nn.Parameter(torch.ones(2))]}, hidden], 1.0, (0.9, 0.95))
    for lr in (1e-2, 1e-3):
        before = weight.detach().clone()
        weight.grad = torch.randn(64, 128)
        for group in muon.param_groups:
            group["lr"] = lr
        muon.step()
        assert 0.1 * lr < (weight - before).square().mean().sqrt() < 0.3 * lr


def test_a_closure_computes_the_gradients():
    weight = torch.nn.Parameter(torch.ones(4, 8))
    hidden = {"params": [weight], "orthogonal": True, "weight_decay": 0.0}
    muon = Muon([{"params": [torch.nn.Parameter(torch.ones(2))]}, hidden], 0.1, (0.9, 0.95))

    def closure():
        muon.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert muon.step(closure).item() == 32 and float(weight.detach().square().sum()) < 32
    assert muon.step() is None


def test_matrices_of_the_blocks_take_it_and_all_else_is_adamw(tmp_path):
    config = tiny(stage(steps=3), optimizer="muon", weight_decay=0.1)
    muon = Trainer(config, tmp_path / "muon")
    taken = {id(p) for g in muon.optimizer.param_groups if g["orthogonal"] for p in g["params"]}
    names = {name for name, p in muon.model.named_parameters() if id(p) in taken}
    weights = {f"attn{i}.to_{p}.weight" for i in (1, 2) for p in ("q", "k", "v", "out.0")} | {
        "experts.w1",
        "experts.w2",
    }
    assert names == {f"blocks.{block}.{name}" for block in range(2) for name in weights}
    everything = [p for g in muon.optimizer.param_groups for p in g["params"]]
    assert len(everything) == len({id(p) for p in everything}) == len(list(muon.model.parameters()))

    plain = copy.deepcopy(muon.model)  # one step of each on the same gradients, none of them zero
    steps = [
        make_optimizer(model, name, 1e-2, config.betas, 0.1) for model, name in ((muon.model, "muon"), (plain, "adamw"))
    ]
    for p, other in zip(muon.model.parameters(), plain.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        other.grad = p.grad.clone()
    for step in steps:
        step.step()
    want = dict(plain.named_parameters())
    assert {name for name, p in muon.model.named_parameters() if not torch.equal(p, want[name])} == names


def test_a_resumed_run_of_muon_is_the_whole_one(tmp_path):
    config = tiny(optimizer="muon")
    assert_same_run(trained(config, tmp_path / "whole"), trained(config, tmp_path / "parts", 1, 3, 5))


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon, got 'sgd'"):
        tiny(optimizer="sgd")

"""The model against its equations, sample by sample, in every shape that hurts."""

import itertools
import weakref
from collections import Counter

import pytest
import torch
from dense_model import dense, double_state, make_config, make_inputs, make_model, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from uvg_engine import ops
from uvg_engine.model import UniViGU, blocks, embeddings, univigu

MASK = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
CASES = {
    "batch of three": {"config": {}},
    "head width 64": {"config": {"head_dim": 64}, "batch": 1},
    "one head of 128": {"config": {"heads": 1, "head_dim": 128}, "batch": 2},
    "odd grid": {"config": {}, "grid": (3, 5, 1)},
    "one video token": {"config": {}, "grid": (1, 1, 1)},
    "other patch": {"config": {"patch": (2, 1, 3)}},
    "no text": {"config": {}, "length": 0},
    "one token": {"config": {}, "length": 1},
    "one condition row": {"config": {}, "cond_len": 1},
    "mask with holes": {"config": {}, "mask": MASK},
    "all text hidden": {"config": {}, "mask": torch.zeros_like(MASK)},
    "times 0 and 1000": {"config": {}, "times": ([0.0, 1000.0, 0.0], [1000.0, 0.0, 0.0])},
    "rounded temb": {"config": {"round_temb": True}},
    "rounded times": {"config": {"round_time": True}},
    "both rounded": {"config": {"round_temb": True, "round_time": True}},
    "odd width of a head": {"config": {"heads": 3, "head_dim": 10}},
    "two condition rows": {"config": {}, "cond_len": 2},
    "no condition row": {"config": {}, "cond_len": 0},
    "all of it at width 64": {
        "config": {"heads": 3, "head_dim": 64, "round_temb": True},
        "grid": (3, 1, 5),
        "cond_len": 2,
        "times": ([0.0, 1000.0, 517.3], [1000.0, 0.0, 0.0]),
        "mask": MASK,
    },
    "all of it in one head of 128": {
        "config": {"heads": 1, "head_dim": 128, "round_time": True, "patch": (1, 1, 1)},
        "grid": (1, 7, 3),
        "cond_len": 1,
        "times": ([1000.0, 0.0, 999.0], [0.0, 1000.0, 3.14]),
        "mask": MASK,
    },
}


def case_inputs(config, case):
    args = [case.get("batch", 3), case.get("grid", (2, 3, 5)), case.get("length", 7), case.get("cond_len", 6)]
    x_v, x_t, time_v, time_t, cond = make_inputs(config, *args)
    if "times" in case:
        time_v, time_t = map(torch.tensor, case["times"])
    return x_v, x_t, time_v, time_t, cond, case.get("mask")


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_matches_the_equations(name):
    case = CASES[name]
    config = make_config(**case["config"])
    model = make_model(config)
    inputs = case_inputs(config, case)
    velocity, logits = model(*inputs)
    want_velocity, want_logits = dense(double_state(model), config, *inputs)
    assert velocity.shape == inputs[0].shape and velocity.dtype == torch.float32
    assert logits.shape == (*inputs[1].shape, config.vocab) and logits.dtype == torch.float32
    assert relative(velocity, want_velocity) < 2e-6
    assert relative(logits, want_logits) < 2e-6


@given(st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
@torch.no_grad()
def test_matches_the_equations_whatever_the_sizes(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    head_dim = data.draw(st.sampled_from([2, 4, 6, 8, 14, 32, 64, 128]))
    patch = tuple(draw(1, 2) for _ in range(3))
    sizes = {"in_channels": draw(1, 5), "text_dim": draw(1, 9), "ffn_dim": draw(1, 40), "vocab": draw(1, 30)}
    config = make_config(heads=draw(1, 3), head_dim=head_dim, freq_dim=2 * draw(1, 9), layers=1, patch=patch, **sizes)
    batch, length = draw(1, 3), draw(0, 6)
    inputs = list(make_inputs(config, batch, tuple(draw(1, 4) for _ in range(3)), length, draw(0, 4)))
    ends = st.sampled_from([0.0, 1000.0, 0.5, 333.25])
    inputs[2:4] = (torch.tensor(data.draw(st.lists(ends, min_size=batch, max_size=batch))) for _ in range(2))
    mask = torch.tensor([[data.draw(st.booleans()) for _ in range(length)] for _ in range(batch)], dtype=torch.bool)
    mask = mask.reshape(batch, length)
    model = make_model(config)
    got = model(*inputs, mask)
    want = dense(double_state(model), config, *inputs, mask)
    assert all(relative(g, w) < 4e-6 for g, w in zip(got, want, strict=True) if w.numel())


@torch.no_grad()
@torch.no_grad()
def test_a_predicted_sample_is_told_as_a_velocity():
    """The head's x0 becomes (x - x0) / sigma, sigma not below 0.05; text is as it was."""
    times = ([0.0, 30.0, 800.0], [500.0] * 3)
    inputs = case_inputs(make_config(), {"times": times})
    told = {p: make_model(make_config(prediction=p))(*inputs) for p in ("velocity", "sample")}
    x_v, sigma = inputs[0], torch.tensor([0.05, 0.05, 0.8]).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(told["sample"][0], (x_v - told["velocity"][0]) / sigma)
    assert torch.equal(told["sample"][1], told["velocity"][1])


def test_each_quirk_changes_the_result():
    config = make_config()
    inputs = case_inputs(config, {})
    outs = []
    for temb, time in itertools.product((False, True), repeat=2):
        changed = make_config(round_temb=temb, round_time=time)
        outs.append(make_model(changed)(*inputs)[0])
    assert all(relative(a, b) > 1e-4 for a, b in itertools.combinations(outs, 2))


@torch.no_grad()
def test_a_batch_equals_its_samples_and_one_condition_serves_all():
    config = make_config()
    model = make_model(config)
    *inputs, _ = case_inputs(config, {})
    together = model(*inputs, MASK)
    for b in range(3):
        alone = model(*(x[b : b + 1] for x in inputs), MASK[b : b + 1])
        assert all(relative(a[0], t[b]) < 2e-6 for a, t in zip(alone, together, strict=True))
    shared = [inputs[4][:1], inputs[4][:1].expand(3, -1, -1)]
    one, three = (model(*inputs[:4], cond)[0] for cond in shared)
    assert torch.equal(one, three)


@torch.no_grad()
def test_hidden_tokens_change_nothing_for_the_others():
    config = make_config()
    model = make_model(config)
    x_v, x_t, *rest, mask = case_inputs(config, CASES["mask with holes"])
    other = torch.where(mask, x_t, (x_t + 7) % config.vocab)
    (velocity, logits), (velocity2, logits2) = model(x_v, x_t, *rest, mask), model(x_v, other, *rest, mask)
    assert torch.equal(velocity, velocity2)
    assert torch.equal(logits[mask], logits2[mask])
    assert not torch.equal(logits[~mask], logits2[~mask]), "a hidden token still asks"


def test_gradients_are_those_of_the_equations():
    """Every parameter has one, finite, and equal to fp64 autograd through the independent model."""
    config = make_config()
    model = make_model(config)
    inputs = case_inputs(config, CASES["mask with holes"])
    weights = [torch.randn(out.shape) for out in model(*inputs)]
    loss = sum((out * w).sum() for out, w in zip(model(*inputs), weights, strict=True))
    loss.backward()
    state = {key: value.requires_grad_() for key, value in double_state(model).items()}
    wanted = sum((out * w).sum() for out, w in zip(dense(state, config, *inputs), weights, strict=True))
    wanted.backward()
    assert relative(loss.detach(), wanted.detach()) < 1e-4
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    grads = UniViGU(config)
    for own, p in zip(grads.parameters(), model.parameters(), strict=True):
        own.data = p.grad
    for key, got in grads.state_dict().items():
        if not key.endswith("inv_freq"):
            assert relative(got, state[key].grad) < 2e-4 or "to_k.bias" in key, key


def test_loss_falls_by_what_the_gradient_says():
    """A step along the gradient changes the loss by step * |grad|^2, to first order."""
    config = make_config(layers=1)
    model = make_model(config)
    inputs = case_inputs(config, {})

    def loss():
        velocity, logits = model(*inputs)
        return velocity.double().square().mean() + logits.double().square().mean()

    loss().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    norm = sum(g.double().square().sum() for g in grads).sqrt().item()
    step, values = 2e-3 / norm, []
    for sign in (1, -2):  # from the middle to +step, then to -step
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p += sign * step * g
            values.append(loss().item())
    assert (values[0] - values[1]) / (2 * step * norm**2) == pytest.approx(1, abs=1e-2)


BF16_CASES = ["batch of three", "head width 64", "one head of 128", "mask with holes", "no text", "rounded temb"]
BF16_CASES += ["all of it at width 64", "all of it in one head of 128"]


@pytest.mark.parametrize("name", BF16_CASES)
@torch.no_grad()
def test_bf16_is_close_to_fp32(name):
    """Products in bf16 (8 bits of mantissa), or weights too: within 3 percent; the text positions stay fp32."""
    config = make_config(**CASES[name]["config"])
    model = make_model(config)
    inputs = case_inputs(config, CASES[name])
    exact = model(*inputs)
    model.compute_dtype = torch.bfloat16
    products = model(*inputs)
    model.compute_dtype = None
    stored = model.to(torch.bfloat16)(*inputs)
    assert model.rotary_emb_text.inv_freq.dtype == torch.float32
    for got in (products, stored):
        for o, e in zip(got, exact, strict=True):
            assert o.dtype == torch.float32 and o.shape == e.shape
            assert not e.numel() or 1e-4 < relative(o, e) < 3e-2


def test_training_after_inference_mode():
    """What inference keeps (the table of angles) serves a later backward."""
    config = make_config()
    model = make_model(config)
    inputs = case_inputs(config, {})
    with torch.inference_mode():
        before = model(*inputs)[0].clone()
    velocity = model(*inputs)[0]
    velocity.sum().backward()
    assert torch.equal(before, velocity.detach())


@torch.no_grad()
def test_memory_after_meta_is_initialised_whole():
    with torch.device("meta"):
        model = UniViGU(make_config())
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(float("nan"))
    model.reset_parameters()
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert torch.equal(model.rotary_emb_text.inv_freq, UniViGU(make_config()).rotary_emb_text.inv_freq)


def test_a_block_compiles_whole():
    """No graph break in a block; aot_eager traces forward and backward without a code generator."""
    config = make_config(layers=1)
    model = make_model(config)
    inputs = case_inputs(config, {})
    want, block = model(*inputs)[0], model.blocks[0]
    graphs = CompileCounterWithBackend("aot_eager")
    for name in ("norm", "mix", "ask_condition"):
        setattr(block, name, torch.compile(getattr(block, name), fullgraph=True, backend=graphs))
    got = model(*inputs)[0]
    assert graphs.frame_count == 3
    got.sum().backward()
    assert relative(got.detach(), want.detach()) < 1e-6
    assert block.experts.w1.grad is not None


def test_one_pass_updates_the_stream_and_norms_it_for_the_next_block(monkeypatch):
    model, calls = make_model(make_config(layers=3)), Counter()
    for name in ("gated_residual", "gated_residual_norm", "modulated_layer_norm"):
        for module in (blocks, univigu, ops):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, counted(getattr(module, name), name, calls))
    model(*case_inputs(model.config, {}))
    # of the norms alone one for the first block and one a head; of the updates alone the last
    assert calls == {"modulated_layer_norm": 3, "gated_residual_norm": 3 * 3 - 1, "gated_residual": 1}


def counted(function, name, calls):
    def counting(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return counting


def test_wrong_shapes_are_told():
    config = make_config()
    model = make_model(config)
    x_v, x_t, time_v, time_t, cond, _ = case_inputs(config, {})
    for args, rule in (
        ((x_v[:, :3], x_t, time_v, time_t, cond), "x_v must be"),
        ((x_v[..., :-1], x_t, time_v, time_t, cond), "divisible by the patch"),
        ((x_v[:, :, :0], x_t, time_v, time_t, cond), "none of them 0"),
        ((x_v, x_t[:2], time_v, time_t, cond), "x_t must be"),
        ((x_v, x_t, time_v[:2], time_t, cond), "time_v must be"),
        ((x_v, x_t, time_v, time_t, cond[..., 1:]), "cond must be"),
        ((x_v, x_t, time_v, time_t, cond, MASK[:2]), "text_mask must be"),
        ((x_v, x_t, time_v, time_t, cond, MASK.int()), "mask must be bool"),
    ):
        with pytest.raises(ValueError, match=rule):
            model(*args)


@torch.no_grad()
def test_angles_of_a_captured_graph_are_not_kept(monkeypatch):
    """Its memory has no values until a replay; and a table that a graph reads lives as long as the model."""
    rope = make_model(make_config()).rotary_emb_text
    short = rope.table(3)
    monkeypatch.setattr(embeddings, "capturing", lambda device: True)
    captured = rope.table(65)
    assert rope.table(3) is short and captured.shape[1] == 128 and rope.table(65) is not captured
    monkeypatch.setattr(embeddings, "capturing", lambda device: False)
    long, short_alive = rope.table(65), weakref.ref(short)
    assert torch.equal(long, captured) and rope.table(65) is rope.table(3) is long
    del short
    assert short_alive() is not None
    rope.forget_table()
    assert short_alive() is None

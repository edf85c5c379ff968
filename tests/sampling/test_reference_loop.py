"""The engine against loops written out by hand from the equations, on the model's dense call."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import alone, make_engine, make_model, make_video

from uvg_engine.model import UniViGU, UniViGUConfig, load_published
from uvg_engine.ops import flow_source
from uvg_engine.reference import philox
from uvg_engine.sampling import Engine, Request, Savings
from uvg_engine.sampling.loop import Loop
from uvg_engine.sampling.prepare import prepare
from uvg_engine.sampling.state import State

GOLDEN = Path(__file__).parents[1] / "data" / "parity_small.safetensors"
LATENT, LENGTH, VOCAB = (12, 2, 4, 4), 7, 26
# what diffusers' scheduler does to its levels and times
QUIRKS = {"sigma_end": 1e-3, "sigma_below_one": 1e-6, "integer_times": True}


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def shifted(steps, shift):
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * even / (1 + (shift - 1) * even)).tolist()


def start(seed):
    size = LATENT[0] * LATENT[1] * LATENT[2] * LATENT[3]
    spans = (torch.tensor([[0, n]], dtype=torch.int32) for n in (size, LENGTH))
    noise, source = flow_source(torch.tensor([seed]), *spans, size, LENGTH, VOCAB)
    return noise.view(1, *LATENT), source[None]


class ByHand:
    """One sample, step by step; every forward is the dense call."""

    def __init__(self, engine, prompt=None):
        self.model, self.encoder = engine.model, engine.text_encoder
        self.null = self.encoder.null()[None]
        self.cond = self.null if prompt is None else self.encoder.encode([prompt])[0][None]

    @torch.no_grad()
    def dense(self, x, tokens, video_sigma, text_sigma, cond):
        times = (torch.tensor([1000.0 * sigma]) for sigma in (video_sigma, text_sigma))
        return self.model(x, tokens, *times, cond)

    def guided(self, x, tokens, sigma, text_sigma, guidance):
        v_c, logits = self.dense(x, tokens, sigma, text_sigma, self.cond)
        v_u, _ = self.dense(x, tokens, sigma, text_sigma, self.null)
        return v_u + guidance * (v_c - v_u), logits[0]


def uniforms(seed, step, stream, lane=0):
    return philox.uniform(philox.words(torch.tensor(seed), step, stream, torch.arange(LENGTH))[lane], torch.float64)


def jump(tokens, logits, probability, seed, step):
    """Draw from all logits by inverse CDF, then toss the coins."""
    cdf = logits.double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cdf, uniforms(seed, step, philox.DRAW)[:, None], right=True)[:, 0]
    return torch.where(uniforms(seed, step, philox.COIN) < probability, drawn, tokens[0])[None]


@pytest.fixture(scope="module")
def engine():
    return make_engine(make_model(3))


@pytest.mark.parametrize("guidance", [5.0, 1.0, 0.0, -1.5])
def test_generate_by_euler(engine, guidance):
    loop, prompt = ByHand(engine, "a red seven"), "a red seven"
    x, _ = start(11)
    tokens = torch.tensor([engine.tokenizer.encode(prompt)])
    for sigma, after in pairwise(shifted(8, 3.0)):
        v, _ = loop.guided(x, tokens, sigma, 0.0, guidance)
        x = x + v * (after - sigma)
    got = alone(engine, Request("generate", prompt, seed=11, num_steps=8, guidance=guidance, shift=3.0))
    assert relative(got.latent, x[0]) <= 1e-5


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_generate_by_the_unipc_of_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2, solver_type="bh2"
    )
    scheduler.set_timesteps(steps)
    engine = make_engine(make_model(3), defaults={"jobs": {"generate": QUIRKS}})
    loop, prompt = ByHand(engine, "the two"), "the two"
    x, _ = start(5)
    tokens = torch.tensor([engine.tokenizer.encode(prompt)])
    for time in scheduler.timesteps:
        v, _ = loop.guided(x, tokens, float(time) / 1000, 0.0, 3.0)
        x = scheduler.step(v, time, x).prev_sample
    request = Request("generate", prompt, seed=5, num_steps=steps, guidance=3.0, shift=3.0, solver="unipc")
    assert relative(alone(engine, request).latent, x[0]) <= 1e-5


@pytest.mark.parametrize("rule", ["euler", "exact"])
def test_caption(engine, rule):
    """The latent stands still at time 0 under the null condition; kappa_t = t, so the jump rate is 1 / (1 - t)."""
    video, loop = make_video(4), ByHand(engine)
    x = engine.codec.encode(video)[None]
    for seed in (2, 3):
        _, tokens = start(seed)
        for i in range(10):
            t, h = i / 10, 1 / 10
            _, logits = loop.dense(x, tokens, 0.0, 1 - t, loop.null)
            share = h / (1 - t)
            share = 1.0 if i == 9 else share if rule == "exact" else 1 - torch.tensor(-share).exp().item()
            tokens = jump(tokens, logits[0], share, seed, i)
        got = alone(engine, Request("caption", video=video, seed=seed, num_steps=10, text_rule=rule))
        assert got.tokens == tuple(tokens[0].tolist())


@pytest.mark.parametrize("rule", ["euler", "progress"])
def test_joint(engine, rule):
    """Both streams at one time; the text is drawn under the prompt, never under the null condition."""
    loop, prompt = ByHand(engine, "one green"), "one green"
    for seed in (7, 8):
        x, tokens = start(seed)
        sigmas = shifted(6, 3.0)
        for i, (sigma, after) in enumerate(pairwise(sigmas)):
            v, logits = loop.guided(x, tokens, sigma, sigma, 4.0)
            rate = (sigma - after) / sigma
            share = i / 5 if rule == "progress" else 1.0 if i == 5 else 1 - torch.tensor(-rate).exp().item()
            tokens = jump(tokens, logits, share, seed, i)
            x = x + v * (after - sigma)
        if rule == "progress":
            tokens = loop.dense(x, tokens, 0.0, 0.0, loop.cond)[1].argmax(-1)
        request = Request("joint", prompt, seed=seed, num_steps=6, guidance=4.0, shift=3.0, text_rule=rule)
        got = alone(engine, request)
        assert relative(got.latent, x[0]) <= 1e-5 and got.tokens == tuple(tokens[0].tolist())


class GoldenText:
    """The prompt "0" or "1" is a sample of the golden file: its tokens, its condition."""

    text_dim, max_len, vocab_size, pad_id, unk_id, mask_id = 48, 20, 500, 0, 0, None

    def __init__(self, tensors):
        self.conditions, self.null_rows = tensors["in.cond_t"], tensors["in.null_cond"][0]
        self.ids = [ids[mask].tolist() for ids, mask in zip(tensors["in.x_t"], tensors["in.mask"], strict=True)]

    def encode(self, text):
        if isinstance(text, list):  # as a text encoder
            return [self.conditions[int(each)] for each in text]
        return self.ids[int(text)]

    def null(self):
        return self.null_rows

    def unknown_words(self, text):
        return []


class LatentCodec:
    """The latents themselves: 16 channels, a cell a pixel."""

    def latent_shape(self, video):
        return 16, *video


@pytest.mark.parametrize("savings", [Savings(), Savings.none()], ids=["savings", "none"])
def test_the_authors_own_trajectory(savings):
    """Six Euler steps, CFG 5, shift 3, from the noise of the golden file; one of its two prompts has pads."""
    with safe_open(GOLDEN, "pt") as file:
        tensors, meta = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    model = UniViGU(UniViGUConfig(**json.loads(meta["config"]), round_temb=meta["round_temb"] == "True"))
    load_published(model, {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    text = GoldenText(tensors)
    defaults = {"frames": 3, "height": 8, "width": 12, "text_length": 16}
    engine = Engine(model, LatentCodec(), text, text, defaults)
    requests = [Request("generate", prompt, seed=0, num_steps=6, guidance=5.0, shift=3.0) for prompt in "01"]
    states = [State(prepare(request, engine), engine, savings) for request in requests]
    for state, noise in zip(states, tensors["in.x_v"], strict=True):
        state.latents = noise.flatten()
    loop = Loop(engine, savings)
    for _ in range(6):
        loop.advance(states)
    got = torch.stack([state.latents.view(16, 3, 8, 12) for state in states])
    assert all(state.done for state in states)
    assert relative(got, tensors["out.t2v_6steps_cfg5_shift3"]) <= 1e-4

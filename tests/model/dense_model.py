"""The model once more, straight from its equations: fp64, sample by sample, nothing of uvg_engine but its config."""

import math

import torch
from torch.nn import functional as F

from uvg_engine.model import UniViGU, UniViGUConfig


def make_config(**changes):
    sizes = {"heads": 2, "head_dim": 32, "in_channels": 4, "text_dim": 24, "freq_dim": 32, "ffn_dim": 96, "layers": 2}
    return UniViGUConfig(**{**sizes, "vocab": 40, **changes})


def make_model(config, seed=0):
    """A model with no zero anywhere: norm weights about one, all else of the scale of its fan-in."""
    model, gen = UniViGU(config), torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for key, value in state.items():
        if key.endswith("inv_freq"):
            continue
        noise = torch.randn(value.shape, generator=gen)
        if "norm" in key and key.endswith("weight"):
            value.copy_(1 + 0.2 * noise)
        elif key.endswith("weight"):
            value.copy_(noise * (1.0 if "embed.w" in key else value[0].numel() ** -0.5))
        else:
            value.copy_(0.3 * noise)
    return model


def make_inputs(config, batch, grid, length, cond_len, seed=1):
    gen = torch.Generator().manual_seed(seed)
    size = [g * p for g, p in zip(grid, config.patch, strict=True)]
    x_v = torch.randn(batch, config.in_channels, *size, generator=gen)
    x_t = torch.randint(config.vocab, (batch, length), generator=gen)
    time_v, time_t = (1000 * torch.rand(batch, generator=gen) for _ in range(2))
    return x_v, x_t, time_v, time_t, torch.randn(batch, cond_len, config.text_dim, generator=gen)


def dense(state, config, x_v, x_t, time_v, time_t, cond, mask=None):
    """(velocity, logits) in fp64. state: fp64 tensors under the published keys."""
    mask = torch.ones(x_t.shape, dtype=torch.bool) if mask is None else mask
    outs = [_sample(state, config, *sample) for sample in zip(x_v.double(), x_t, time_v, time_t, cond.double(), mask)]
    return tuple(torch.stack(out) for out in zip(*outs))


def _sample(state, config, x_v, x_t, time_v, time_t, cond, mask):
    def lin(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def time(name, t):
        t = (t.bfloat16() if config.round_time else t).float()
        half = config.freq_dim // 2
        # fp32, as the published code: a rounded temb shows the last bits of these angles
        angle = (t * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)).double()
        x = lin(f"{name}.time_embedder.linear_1", torch.cat([angle.cos(), angle.sin()]))
        temb = lin(f"{name}.time_embedder.linear_2", F.silu(x))
        temb = temb.bfloat16().double() if config.round_temb else temb
        return temb, lin(f"{name}.time_proj", F.silu(temb)).view(6, -1)

    def norm(x, weight=None, bias=None, eps=1e-6):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def rms(name, x):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * state[f"{name}.weight"]

    def attention(name, q, k, v, visible=None):
        q, k, v = (x.view(len(x), config.heads, config.head_dim).transpose(0, 1) for x in (q, k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(config.head_dim)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        return lin(f"{name}.to_out.0", (scores.softmax(-1) @ v).transpose(0, 1).reshape(q.shape[1], -1))

    weight = state["patch_embedding.weight"]
    patches = F.conv3d(x_v[None], weight, state["patch_embedding.bias"], stride=weight.shape[2:])[0]
    grid, num_video = patches.shape[1:], patches[0].numel()
    h = torch.cat([patches.flatten(1).T, state["vocab_embed.weight"][x_t]])
    is_video = torch.arange(len(h)) < num_video
    visible = torch.cat([torch.ones(num_video, dtype=torch.bool), mask])
    temb_v, mod_v = time("time_embedding_v", time_v)
    temb_t, mod_t = time("time_embedding_t", time_t)
    cond = lin("cond_text_embedder.linear_2", F.gelu(lin("cond_text_embedder.linear_1", cond), approximate="tanh"))

    for i in range(config.layers):
        b = f"blocks.{i}."
        table = state[b + "scale_shift_table"][0]
        per_row = torch.where(is_video[:, None, None], table + mod_v, table + mod_t)
        shift1, scale1, gate1, shift2, scale2, gate2 = per_row.unbind(1)
        a = norm(h) * (1 + scale1) + shift1
        q, k = (rms(f"{b}attn1.norm_{n}", lin(f"{b}attn1.to_{n}", a)) for n in "qk")
        q, k = (
            torch.cat([_rope_video(x[:num_video], grid, config), _rope_text(x[num_video:], state, config)])
            for x in (q, k)
        )
        h = h + gate1 * attention(b + "attn1", q, k, lin(b + "attn1.to_v", a), visible)
        n = norm(h, state[b + "norm2.weight"], state[b + "norm2.bias"])
        q, k = rms(b + "attn2.norm_q", lin(b + "attn2.to_q", n)), rms(b + "attn2.norm_k", lin(b + "attn2.to_k", cond))
        h = h + attention(b + "attn2", q, k, lin(b + "attn2.to_v", cond))
        f = norm(h) * (1 + scale2) + shift2
        video, text = (
            lin(f"{b}{e}.net.2", F.gelu(lin(f"{b}{e}.net.0.proj", f), approximate="tanh")) for e in ("ffn", "ffn_t")
        )
        h = h + gate2 * torch.where(is_video[:, None], video, text)

    shift, scale = state["scale_shift_table_v"][0] + temb_v
    out = lin("video_head.proj_out", norm(h[:num_video]) * (1 + scale) + shift)
    velocity = torch.einsum("fyxabcn->nfaybxc", out.view(*grid, *weight.shape[2:], -1)).reshape(x_v.shape)
    shift, scale = state["scale_shift_table_t"][0] + temb_t
    text = norm(h[num_video:], state["text_head.norm_final.weight"], eps=1e-5) * (1 + scale) + shift
    return velocity, lin("text_head.linear", text)


def _rope_video(x, grid, config):
    """Complex numbers of neighbouring columns, turned by frame, then y, then x."""
    side = 2 * (config.head_dim // 6)
    where = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [
        position.reshape(-1, 1) * 10000 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        for position, width in zip(where, (config.head_dim - 2 * side, side, side), strict=True)
    ]
    turn = torch.polar(torch.tensor(1.0, dtype=torch.float64), torch.cat(angles, 1))[:, None]
    pairs = torch.view_as_complex(x.reshape(len(x), config.heads, -1, 2))
    return torch.view_as_real(pairs * turn).flatten(1)


def _rope_text(x, state, config):
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * state["rotary_emb_text.inv_freq"]
    cos, sin = (torch.cat([f, f], 1)[:, None] for f in (angle.cos(), angle.sin()))
    x = x.view(len(x), config.heads, config.head_dim)
    low, high = x.chunk(2, -1)
    return (x * cos + torch.cat([-high, low], -1) * sin).flatten(1)


def double_state(model):
    return {key: value.detach().double() for key, value in model.state_dict().items()}


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()

"""The block of docs/design.md as one writes it in plain torch: the peer "torch", and what the compilers get."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from uvg_engine.model import UniViGUConfig


class PlainAttention(nn.Module):
    """Projections and norms under the published names. Letters: L rows, U keys, D width, N heads, H head width."""

    def __init__(self, config: UniViGUConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, keys: Tensor, video: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """x [1, L, D], keys [1, U, D] -> [1, L, D]. video [2, Lv, H/2], text [2, Lt, H/2]: cos and sin."""
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(keys)), self.to_v(keys)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        if video is not None and text is not None:
            q, k = rotated(q, video, text), rotated(k, video, text)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


class PlainExpert(nn.Module):
    """Linear, GELU, Linear under the published names."""

    def __init__(self, config: UniViGUConfig) -> None:
        super().__init__()
        first = nn.ModuleDict({"proj": nn.Linear(config.dim, config.ffn_dim)})
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(config.ffn_dim, config.dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](functional.gelu(self.net[0]["proj"](x), approximate="tanh"))


class PlainBlock(nn.Module):
    """One sample; takes the state dict of `uvg_engine.model.blocks.Block`. The streams are apart but for attention.

    As diffusers does, the residual stream has the dtype of the weights, and norms and residuals are taken in fp32.
    """

    def __init__(self, config: UniViGUConfig, video: Tensor, text: Tensor) -> None:
        """video, text: fp32 cos and sin [2, L, H/2] of every row."""
        super().__init__()
        self.attn1, self.attn2 = PlainAttention(config), PlainAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.ffn, self.ffn_t = PlainExpert(config), PlainExpert(config)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, config.dim))
        self.register_buffer("video", video)
        self.register_buffer("text", text)

    def forward(self, video: Tensor, text: Tensor, cond: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """video [1, Lv, D], text [1, Lt, D], cond [1, U, D], modulation [2, 6, D] fp32 -> the two streams."""
        both, lengths = (video, text), [video.shape[1], text.shape[1]]
        tables = (self.scale_shift_table.float() + modulation).unsqueeze(1).unbind(0)
        (shift1, scale1, gate1, shift2, scale2, gate2) = zip(*(table.unbind(1) for table in tables), strict=True)

        a = torch.cat([modulated(x, shift1[m], scale1[m]) for m, x in enumerate(both)], 1)
        y = self.attn1(a, a, self.video, self.text).split(lengths, 1)
        h = torch.cat([gated(x, y[m], gate1[m]) for m, x in enumerate(both)], 1)
        weight, bias = self.norm2.weight.float(), self.norm2.bias.float()
        n = functional.layer_norm(h.float(), h.shape[-1:], weight, bias, self.norm2.eps).type_as(h)
        both = (h + self.attn2(n, cond)).split(lengths, 1)

        f = [modulated(x, shift2[m], scale2[m]) for m, x in enumerate(both)]
        return gated(both[0], self.ffn(f[0]), gate2[0]), gated(both[1], self.ffn_t(f[1]), gate2[1])


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (functional.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift).type_as(x)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return (x.float() + y * gate).type_as(x)


def rotated(x: Tensor, video: Tensor, text: Tensor) -> Tensor:
    """x [1, N, L, H] by its angles: video rows in interleaved pairs, text rows in halves."""
    frames, words = x.split([video.shape[1], text.shape[1]], 2)
    a, b = frames.unflatten(-1, (-1, 2)).unbind(-1)
    frames = torch.stack([a * video[0] - b * video[1], a * video[1] + b * video[0]], -1).flatten(-2)
    a, b = words.chunk(2, -1)
    words = torch.cat([a * text[0] - b * text[1], a * text[1] + b * text[0]], -1)
    return torch.cat([frames, words], 2).type_as(x)

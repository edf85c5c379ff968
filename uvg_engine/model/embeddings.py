"""Time, condition and position embeddings. Letters: B samples, D width, H head width, P positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from uvg_engine.backends.devices import capturing
from uvg_engine.model.config import UniViGUConfig
from uvg_engine.model.linear import linear
from uvg_engine.reference.qk_norm_rope import axis_of_pair

ROPE_THETA = 10000.0


def time_sinusoid(time_B: Tensor, freq_dim: int) -> Tensor:
    """[cos, sin] of time * 10000^(-j/half): [B, freq_dim] fp32. time: model units, 0 to 1000.

    In fp32 and in this order, as diffusers' Timesteps: at time 1000 the angles carry 5e-5 of rounding, the same then.
    """
    half = freq_dim // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=time_B.device) / half
    angle = time_B.float()[:, None] * exponent.exp()
    return torch.cat([angle.cos(), angle.sin()], -1)


class Mlp(nn.Module):
    """Two Linears under the published names `linear_1`, `linear_2`."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)


class TimeEmbedding(nn.Module):
    """Model time -> temb [B, D] and the six modulations [B, 6, D] of one modality."""

    def __init__(self, config: UniViGUConfig) -> None:
        super().__init__()
        self.config = config
        self.time_embedder = Mlp(config.freq_dim, config.dim)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)

    def forward(self, time_B: Tensor, dtype: torch.dtype, isolate: bool) -> tuple[Tensor, Tensor]:
        """time: fp [B] in model units. Returns (temb [B, D], modulation [B, 6, D]), fp32."""
        if isolate and len(time_B) > 1:  # a vectorised cos or SiLU may round by place in the tensor
            alone = [self(time, dtype, False) for time in time_B.split(1)]
            return torch.cat([temb for temb, _ in alone]), torch.cat([modulation for _, modulation in alone])
        time = time_B.bfloat16().float() if self.config.round_time else time_B
        x = linear(self.time_embedder.linear_1, time_sinusoid(time, self.config.freq_dim), dtype)
        temb = linear(self.time_embedder.linear_2, functional.silu(x), dtype).float()
        if self.config.round_temb:
            temb = temb.bfloat16().float()
        modulation = linear(self.time_proj, functional.silu(temb), dtype).float()
        return temb, modulation.unflatten(-1, (6, -1))


class ConditionEmbedder(Mlp):
    """Text-encoder rows -> condition rows of model width: Linear, GELU(tanh), Linear."""

    def forward(self, cond: Tensor, dtype: torch.dtype, spans: Tensor | None) -> Tensor:
        """cond: [U, text_dim]. Returns [U, D] in dtype."""
        return linear(self.linear_2, linear(self.linear_1, cond, dtype, spans, "gelu_tanh"), dtype, spans)


class TextRope(nn.Module):
    """Holds `inv_freq` [H/2] of the text stream, which the published checkpoint stores, and the table of angles.

    The buffer stays fp32 whatever dtype the model is cast to: positions in bf16 would be wrong.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.register_buffer("inv_freq", inverse_frequencies(head_dim))
        self.inv_freq: Tensor
        self._tables: list[Tensor] = []  # each for more positions than the one before

    def reset_parameters(self) -> None:
        """Set the buffer to its own values (after `to_empty`)."""
        self.inv_freq = inverse_frequencies(self.head_dim, self.inv_freq.device)
        self.forget_table()

    def forget_table(self) -> None:
        """Make the table anew at its next use: the buffer has changed."""
        self._tables = []

    def table(self, num_positions: int) -> Tensor:
        """`rope_table` for at least this many positions, kept from call to call.

        Not where a CUDA graph is captured. A shorter table lives on, as a captured graph may read it.
        """
        if self._tables and self._tables[-1].shape[1] >= num_positions:
            return self._tables[-1]
        with torch.inference_mode(False):  # the table outlives this call, and a later one may train
            table = rope_table(self.head_dim, 64 * -(-num_positions // 64), self.inv_freq)
        if not capturing(self.inv_freq.device):
            self._tables.append(table)
        return table

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TextRope:
        before = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            self.inv_freq = before.to(self.inv_freq.device)
        self.forget_table()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.inv_freq = self.inv_freq.float()  # with assign=True it takes the dtype of the file
        self.forget_table()


def inverse_frequencies(width: int, device: torch.device | str | None = None) -> Tensor:
    """theta^(-2j/width), fp32 [width/2]."""
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    return (ROPE_THETA**-exponent).float()


def rope_table(head_dim: int, num_positions: int, text_inv_freq: Tensor) -> Tensor:
    """(cos, sin) per kind, position and pair: fp32 [2, P, H/2, 2]; kind 0 video, 1 text. Angles in fp64."""
    side = head_dim // 6
    widths = (head_dim - 4 * side, 2 * side, 2 * side)
    device = text_inv_freq.device
    video = torch.cat(
        [ROPE_THETA ** -(torch.arange(0, w, 2, dtype=torch.float64, device=device) / w) for w in widths if w]
    )
    assert len(video) == len(axis_of_pair(head_dim))
    position = torch.arange(num_positions, dtype=torch.float64, device=device)
    angle = torch.stack([position[:, None] * video, position[:, None] * text_inv_freq.double()])
    return torch.stack([angle.cos(), angle.sin()], -1).float()

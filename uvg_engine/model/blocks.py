"""A transformer block on packed rows: self-attention over both modalities, cross-attention, one expert per modality.

Letters: T rows, D width, N heads, H head width, U condition rows, S spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from uvg_engine import ops
from uvg_engine.backends.devices import put
from uvg_engine.model.config import UniViGUConfig
from uvg_engine.model.layout import Layout, Selection, tiles
from uvg_engine.model.linear import linear
from uvg_engine.ops import modulated_layer_norm

EXPERTS = ("ffn", "ffn_t")  # published names, in the order of the modalities


@dataclass(frozen=True)
class Rows:
    """What every block needs to know of the batch, computed once per forward."""

    layout: Layout
    rope_table: Tensor
    modulation_S6D: Tensor  # time part of the six modulations per span, fp32
    dtype: torch.dtype  # of the matrix products
    spans: Tensor | None  # row spans when samples are isolated
    asking: Asking | None = None  # None: all rows attend to their condition
    int8: bool = False  # products with the blocks' weights, and of queries and keys, in bytes

    def select(self, selection: Selection, asking: Asking | None) -> Rows:
        """What the blocks have to know of these samples."""
        layout, modulation = selection.layout, self.modulation_S6D.index_select(0, selection.spans)
        spans = None if self.spans is None else layout.row_spans_on_cpu
        return replace(self, layout=layout, modulation_S6D=modulation, spans=spans, asking=asking)


@dataclass(frozen=True)
class BlockCondition:
    """What one block's cross-attention reads: k, v [U, D]; constant [B, D] for samples that do not attend (Asking)."""

    k: Tensor
    v: Tensor
    constant: Tensor | None = None


@dataclass(frozen=True)
class Asking:
    """Which rows attend to their condition, where some samples have one whose rows are all equal: any mean of those is
    the same, so that cross-attention adds one vector to all rows of such a sample.

    index: int64, the rows that attend. query_spans [B, 2, 2]: in these rows. spans: of these rows where samples are
    isolated. sample: int64 [T], whose row each is.
    """

    index: Tensor
    query_spans: Tensor
    spans: Tensor | None
    sample: Tensor

    @classmethod
    def build(cls, layout: Layout, asks: Sequence[bool]) -> Asking:
        """asks: per sample. Samples are isolated."""
        spans = layout.row_spans_on_cpu.tolist()
        lens = [length if ask else 0 for (_, length), ask in zip(spans, [*asks, *asks], strict=True)]
        rows = [torch.arange(start, start + length) for (start, _), length in zip(spans, lens, strict=True)]
        table = torch.tensor(tiles(lens), dtype=torch.int32)
        query_spans = table.view(2, layout.num_samples, 2).transpose(0, 1).contiguous()
        sample = torch.arange(layout.num_samples).repeat(2).repeat_interleave(layout.row_spans_on_cpu[:, 1].long())
        device = layout.row_spans.device
        return cls(put(torch.cat(rows), device), put(query_spans, device), table, put(sample, device))


@dataclass(frozen=True)
class Reading:
    """The rows of the last block whose results are read: of the others it needs keys and values alone."""

    selection: Selection
    asking: Asking | None = None


class Weight(nn.Module):
    """A lone `weight` [D], as an RMS norm has it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """Projections and norms of one attention, under the published names."""

    def __init__(self, config: UniViGUConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_out: Sequence[nn.Linear] = nn.ModuleList([nn.Linear(dim, dim)])  # type: ignore[assignment]
        self.norm_q, self.norm_k = Weight(dim), Weight(dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, int8: bool) -> Tensor:
        """[T, D], [U, D], [U, D] -> [T, D]."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))
        if int8:
            return ops.flash_attention_int8(q, k, v, q_spans, k_spans).flatten(-2)
        return ops.flash_attention(q, k, v, q_spans, k_spans)[0].flatten(-2)


class MoeMlp(nn.Module):
    """Experts stacked as [E, ...] for the grouped kernel; the state dict speaks the published names."""

    def __init__(self, config: UniViGUConfig) -> None:
        super().__init__()
        dim, hidden, experts = config.dim, config.ffn_dim, len(EXPERTS)
        self.w1 = nn.Parameter(torch.empty(experts, hidden, dim))
        self.b1 = nn.Parameter(torch.zeros(experts, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden))
        self.b2 = nn.Parameter(torch.zeros(experts, dim))

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """x: [T, D], rows of both modalities."""
        x, w1, b1, w2, b2 = (value.to(rows.dtype) for value in (x, self.w1, self.b1, self.w2, self.b2))
        if rows.int8:
            return ops.moe_mlp_int8(x, w1, b1, w2, b2, rows.layout.group_offsets)
        return ops.moe_mlp(x, w1, b1, w2, b2, rows.layout.group_offsets, row_spans=rows.spans)


_EXPERT_KEYS = (("w1", "net.0.proj.weight"), ("b1", "net.0.proj.bias"), ("w2", "net.2.weight"), ("b2", "net.2.bias"))


class Block(nn.Module):
    """One block; see docs/design.md for the equations."""

    def __init__(self, config: UniViGUConfig) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(config), Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.experts = MoeMlp(config)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, config.dim))
        self._register_state_dict_hook(_publish_experts)
        self.register_load_state_dict_pre_hook(_stack_experts)

    def modulation(self, rows: Rows, first: int, end: int) -> tuple[Tensor, ...]:
        """Some of shift, scale and gate of self-attention (0, 1, 2) and of the experts (3, 4, 5), each [S, D] fp32."""
        return (self.scale_shift_table.float()[:, first:end] + rows.modulation_S6D[:, first:end]).unbind(1)

    def condition_kv(self, cond: Tensor, dtype: torch.dtype, spans: Tensor | None) -> BlockCondition:
        """Keys and values [U, D] of the condition rows [U, D]; they depend on no step and no token."""
        k = linear(self.attn2.to_k, cond, dtype, spans)
        k, _ = ops.qk_norm_rope(k, None, self.attn2.norm_k.weight, None)
        return BlockCondition(k, linear(self.attn2.to_v, cond, dtype, spans))

    def constant(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """What cross-attention adds [1, D] where all rows of a condition have this value [1, D]."""
        return linear(self.attn2.to_out[0], value, dtype)

    def forward(self, h: Tensor, rows: Rows, condition: BlockCondition) -> Tensor:
        """h: residual stream [T, D]. Returns the new one."""
        return self.ask_condition(*self.mix(h, self.norm(h, rows), rows), rows, condition)[0]

    def norm(self, h: Tensor, rows: Rows) -> Tensor:
        """What `mix` reads beside the stream [T, D], where no block before has made it."""
        shift, scale = self.modulation(rows, 0, 2)
        return modulated_layer_norm(h, shift, scale, rows.layout.row_spans).to(rows.dtype)

    def mix(
        self, h: Tensor, a: Tensor, rows: Rows, asks: Rows | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Self-attention, which knows of no condition: the stream [T, D] after it, and its norm for `ask_condition`.

        a: the stream's norm. asks, index: some of the rows and where they lie among all; then these alone ask, and the
        results are theirs.
        """
        layout, dtype, int8, attn = rows.layout, rows.dtype, rows.int8, self.attn1
        k, v = (linear(layer, a, dtype, rows.spans, int8=int8) for layer in (attn.to_k, attn.to_v))
        weight_q, weight_k, table = attn.norm_q.weight, attn.norm_k.weight, rows.rope_table
        if asks is None or index is None:
            asks = rows
            q = linear(attn.to_q, a, dtype, rows.spans, int8=int8)
            q, k = ops.qk_norm_rope(q, k, weight_q, weight_k, layout.rope_spans, table, attn.heads)
        else:
            h = h.index_select(0, index)
            q = linear(attn.to_q, a.index_select(0, index), dtype, asks.spans, int8=int8)
            q, _ = ops.qk_norm_rope(q, None, weight_q, None, asks.layout.rope_spans, table, attn.heads)
            k, _ = ops.qk_norm_rope(k, None, weight_k, None, layout.rope_spans, table, attn.heads)
        y = attn.attend(q, k, v, asks.layout.query_spans, layout.key_spans, int8)
        y, norm = linear(attn.to_out[0], y, dtype, asks.spans, int8=int8), self.norm2
        (gate,) = self.modulation(asks, 2, 3)
        return ops.gated_residual_norm(
            h, y, gate, asks.layout.row_spans, weight=norm.weight, bias=norm.bias, eps=norm.eps, norm_dtype=dtype
        )

    def ask_condition(
        self, h: Tensor, n: Tensor, rows: Rows, condition: BlockCondition, following: Block | None = None
    ) -> tuple[Tensor, Tensor]:
        """What follows `mix`: cross-attention and the experts. The stream [T, D], and its norm for the following block,
        made in the pass that writes the stream; where none follows, the stream twice."""
        spans, dtype = rows.layout.row_spans, rows.dtype
        shift, scale, gate = self.modulation(rows, 3, 6)
        y = self._cross(n, rows, condition)
        h, f = ops.gated_residual_norm(h, y, None, None, shift, scale, spans, norm_dtype=dtype)
        y = self.experts(f, rows)
        if following is None:
            return (ops.gated_residual(h, y, gate, spans),) * 2
        shift, scale = following.modulation(rows, 0, 2)
        return ops.gated_residual_norm(h, y, gate, spans, shift, scale, spans, norm_dtype=dtype)

    def _cross(self, n: Tensor, rows: Rows, condition: BlockCondition) -> Tensor:
        """Cross-attention of normed rows [T, D] to their condition."""
        layout, asking = rows.layout, rows.asking
        if asking is None:
            return self._ask(n, condition, layout.query_spans, rows, rows.spans)
        assert condition.constant is not None
        y = condition.constant.index_select(0, asking.sample)
        if not len(asking.index):
            return y
        n = n.index_select(0, asking.index)
        asked = self._ask(n, condition, asking.query_spans, rows, asking.spans)
        return y.index_copy(0, asking.index, asked)

    def _ask(
        self, n: Tensor, condition: BlockCondition, query_spans: Tensor, rows: Rows, spans: Tensor | None
    ) -> Tensor:
        """Of those rows n that attend, which lie in query_spans and spans."""
        cross = self.attn2
        q = linear(cross.to_q, n, rows.dtype, spans, int8=rows.int8)
        q, _ = ops.qk_norm_rope(q, None, cross.norm_q.weight, None)
        y = cross.attend(q, condition.k, condition.v, query_spans, rows.layout.cond_spans, rows.int8)
        return linear(cross.to_out[0], y, rows.dtype, spans, int8=rows.int8)


def _publish_experts(module: Block, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for stacked, published in _EXPERT_KEYS:
        value = state.pop(f"{prefix}experts.{stacked}")
        for index, expert in enumerate(EXPERTS):
            state[f"{prefix}{expert}.{published}"] = value[index]


def _stack_experts(module: Block, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    for stacked, published in _EXPERT_KEYS:
        keys = [f"{prefix}{expert}.{published}" for expert in EXPERTS]
        if all(key in state for key in keys):
            values = [state.pop(key) for key in keys]
            if len({v.shape for v in values}) == 1:
                state[f"{prefix}experts.{stacked}"] = torch.stack(values)
            else:
                state.update(zip(keys, values, strict=True))

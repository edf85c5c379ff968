"""A whole transformer block: ours, the same in plain torch, what compilers make of that, and diffusers' block.

Ours computes the condition's keys and values in every call, as the others do; sampling computes them once a request.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import BOTH, FORWARD, IN_BYTES, Case, Peer, Size, normal
from bench.ops.qk_norm_rope import angles
from bench.plain_block import PlainBlock
from uvg_engine.model import CONFIGS, Layout
from uvg_engine.model.blocks import Block, Rows
from uvg_engine.model.embeddings import inverse_frequencies, rope_table

CONDITION = 512  # rows of the condition, as Wan has them


class Ours(nn.Module):
    """A block and what it knows of its one sample."""

    def __init__(self, size: Size, dtype: torch.dtype, int8: bool = False) -> None:
        super().__init__()
        self.size, self.dtype, self.int8 = size, dtype, int8
        self.block = Block(CONFIGS[size.model]).to(dtype)
        for parameter in self.block.parameters():
            parameter.data = normal(dtype, *parameter.shape, scale=0.02, leaf=False)
        self.table = table(size)
        self._known: dict[torch.device, tuple[Layout, Tensor]] = {}

    def forward(self, h: Tensor, cond: Tensor, modulation: Tensor, *weights: Tensor) -> Tensor:
        """h [T, D] fp32, cond [U, D], modulation [2, 6, D] fp32 -> [T, D]. weights: the block's own parameters."""
        layout, turns = self._on(h.device)
        rows = Rows(layout, turns, modulation, self.dtype, None, int8=self.int8)
        return self.block(h, rows, self.block.condition_kv(cond, self.dtype, None))

    def _on(self, device: torch.device) -> tuple[Layout, Tensor]:
        """Layout and table of angles, made once, as a model makes them once a batch."""
        if device not in self._known:
            with torch.inference_mode(False):  # a later call may want gradients
                layout = Layout.build([self.size.grid], [self.size.text], [CONDITION], device=device)
                self._known[device] = layout, self.table.to(device)
        return self._known[device]


def table(size: Size) -> Tensor:
    head = size.width // size.heads
    return rope_table(head, max(*size.grid, size.text), inverse_frequencies(head))


def make(size: Size, dtype: torch.dtype, int8: bool) -> tuple[Any, ...]:
    """(block, h, condition, time's modulations, weights); the weights want gradients."""
    ours = Ours(replace(size, samples=1), dtype, int8)
    h = normal(torch.float32, ours.size.rows, size.width, leaf=False)
    condition = normal(dtype, CONDITION, size.width, leaf=False)
    return ours, h, condition, normal(torch.float32, 2, 6, size.width, leaf=False), *ours.parameters()


def torch_peer(size: Size, ours: Ours, h: Tensor, cond: Tensor, modulation: Tensor, *weights: Tensor) -> Peer:
    video, text = (each.movedim(-1, 0).to(h.device) for each in angles(ours.size, ours.table))
    block = PlainBlock(CONFIGS[size.model], video, text).to(h.device)
    block.load_state_dict({**ours.block.state_dict(), "video": video, "text": text})
    block.to(ours.dtype)
    block.video, block.text = video, text  # angles stay in fp32
    streams = (x[None].to(ours.dtype) for x in h.split([size.video, size.text]))
    return Peer(block, (*streams, cond[None], modulation), lambda outs: torch.cat(outs, 1)[0].float())


def full_peer(size: Size, ours: Ours, *inputs: Tensor) -> Peer:
    full = copy.copy(ours)  # the same block
    full.int8 = False
    return Peer(full, inputs)


class Wan(nn.Module):
    """diffusers' block with its rotations at hand."""

    def __init__(self, size: Size, ours: Ours, device: torch.device) -> None:
        super().__init__()
        from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

        state = {key: value for key, value in ours.block.state_dict().items() if not key.startswith("ffn_t.")}
        self.block = WanTransformerBlock(size.width, size.hidden, size.heads, cross_attn_norm=True)
        self.block.load_state_dict(state)
        self.block.to(ours.dtype)
        frames, rows, columns = size.grid
        rope = WanRotaryPosEmbed(size.width // size.heads, (1, 2, 2), max(size.grid))
        self.rotary = tuple(part.to(device) for part in rope(torch.zeros(1, 16, frames, 2 * rows, 2 * columns)))

    def forward(self, h: Tensor, cond: Tensor, modulation: Tensor) -> Tensor:
        return self.block(h, cond, modulation, self.rotary)


def diffusers_peer(size: Size, ours: Ours, h: Tensor, cond: Tensor, modulation: Tensor, *weights: Tensor) -> Peer:
    wan = Wan(size, ours, h.device).to(h.device)
    return Peer(wan, (h[None].to(ours.dtype), cond[None], modulation[:1]), lambda out: out[0].float())


def work(size: Size, item: int) -> tuple[float, float]:
    """(flops of the products, bytes of the weights)."""
    rows, width, hidden = size.video + size.text, size.width, size.hidden
    products = 12 * rows * width**2 + 4 * CONDITION * width**2 + 4 * rows * width * hidden
    attention = 4 * rows * (rows + CONDITION) * width
    return products + attention, item * (8 * width**2 + 4 * width * hidden)


def case(name: str, text: bool, int8: bool = False) -> Case:
    def sized(size: Size) -> Size:
        return replace(size, samples=1, text=size.text if text else 0)

    first = "torch" if text else "diffusers"
    peer = torch_peer if text else diffusers_peer
    return Case(
        lambda ours, *inputs: ours(*inputs),
        shape=lambda size: f"{size.model} Lv={size.video} Lt={sized(size).text} D={size.width} Lc={CONDITION}",
        make=lambda size, dtype: make(sized(size), dtype, int8),
        work=lambda size, item: work(sized(size), item),
        peers={first: lambda size, *inputs: peer(sized(size), *inputs), **({"full": full_peer} if int8 else {})},
        compiled_by=("inductor", "openvino"),
        name=name,
        sizes=("1.3b-2560", "1.3b-8192"),
        passes=(FORWARD,) if int8 else (FORWARD, BOTH),
        slack=IN_BYTES if int8 else None,
        truth=lambda size, device: first,
        whole=True,
    )


CASES = (case("with text", True), case("as Wan", False), case("int8", True, int8=True))

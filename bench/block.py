"""A transformer block against diffusers' WanTransformerBlock, with the same weights on the same video rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.case import Size, normal
from bench.one_op import PASSES, Line, compared
from bench.timing import alternate
from uvg_engine import backends
from uvg_engine.model import CONFIGS, Layout
from uvg_engine.model.blocks import Block, Rows
from uvg_engine.model.embeddings import inverse_frequencies, rope_table

CONDITION = 512  # rows of the condition, as Wan has them
SLACK = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # ours keeps the residual stream in fp32, diffusers in bf16


@dataclass(frozen=True)
class Run:
    """One way to the block's output [rows, D]. trains: also timed with the gradients of its weights."""

    call: Callable[[], Tensor]
    weights: tuple[Tensor, ...]
    trains: bool = True

    def of(self, what: str) -> Callable[[], Any]:
        if what == "forward":
            return torch.inference_mode()(self.call)
        return lambda: torch.autograd.grad(self.call().sum(), self.weights, allow_unused=True)


def bench_block(size: Size, dtype: torch.dtype, seconds: float, **how: Any) -> list[Line]:
    """Lines for one block of the size's model. how: device and min_rounds, as in `timing.alternate`.

    "uvg" does what the peer does; "condition kept" leaves out the keys and values of the condition, which sampling
    computes once for all steps; "with text" has the text rows too, which only this model knows.
    """
    device = torch.device(how.get("device", "cpu"))
    block = Block(CONFIGS[size.name]).to(device, dtype)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    plain, weights = _forward(block, size, dtype, text=0, kept=False), tuple(block.parameters())
    runs = {
        "reference": Run(_on_reference(plain), weights),
        "uvg": Run(plain, weights),
        "uvg, condition kept": Run(_forward(block, size, dtype, text=0, kept=True), weights, trains=False),
        "uvg, with text": Run(_forward(block, size, dtype, text=size.text, kept=False), weights),
    }
    if importlib.util.find_spec("diffusers"):
        runs["diffusers"] = _diffusers(block, size, dtype)
        _require_same(runs["uvg"].of("forward")(), runs["diffusers"].of("forward")(), SLACK[dtype])
    lines = []
    shape = f"{size.name} Lv={size.video} Lt={size.text} D={size.width} Lc={CONDITION}"
    for what in PASSES:
        calls = {name: run.of(what) for name, run in runs.items() if run.trains or what == "forward"}
        head = {"op": "block", "shape": shape, "dtype": str(dtype)[6:], "pass": what}
        lines += [head | line for line in compared(alternate(calls, seconds, **how), {"diffusers"})]
    return lines


def _forward(block: Block, size: Size, dtype: torch.dtype, *, text: int, kept: bool) -> Callable[[], Tensor]:
    device = block.scale_shift_table.device
    head = size.width // size.heads
    layout = Layout.build([size.grid], [text], [CONDITION], device=device)
    table = rope_table(head, max(*size.grid, text), inverse_frequencies(head, device))
    rows = Rows(layout, table, _modulation(size, device).expand(2, -1, -1), dtype, None)
    h = normal(torch.float32, layout.num_rows, size.width, leaf=False).to(device)
    cond = _condition(size, dtype, device)
    with torch.no_grad():
        once = block.condition_kv(cond, dtype, None)
    return lambda: block(h, rows, once if kept else block.condition_kv(cond, dtype, None))


def _diffusers(block: Block, size: Size, dtype: torch.dtype) -> Run:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

    device = block.scale_shift_table.device
    peer = WanTransformerBlock(size.width, size.hidden, size.heads, cross_attn_norm=True).to(device, dtype)
    peer.load_state_dict({key: value for key, value in block.state_dict().items() if not key.startswith("ffn_t.")})
    frames, rows, columns = size.grid
    rope = WanRotaryPosEmbed(size.width // size.heads, (1, 2, 2), max(size.grid)).to(device)
    rotary = rope(torch.zeros(1, 16, frames, 2 * rows, 2 * columns, device=device))
    h = normal(torch.float32, size.video, size.width, leaf=False).to(device, dtype)[None]
    cond, modulation = _condition(size, dtype, device)[None], _modulation(size, device)
    return Run(lambda: peer(h, cond, modulation, rotary)[0], tuple(peer.parameters()))


def _condition(size: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return normal(dtype, CONDITION, size.width, leaf=False).to(device)


def _modulation(size: Size, device: torch.device) -> Tensor:
    return normal(torch.float32, 1, 6, size.width, leaf=False).to(device)


def _on_reference(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def forced() -> Tensor:
        with backends.force("reference"):
            return call()

    return forced


def _require_same(ours: Tensor, theirs: Tensor, slack: float) -> None:
    worst, largest = float((ours.float() - theirs.float()).abs().max()), float(theirs.float().abs().max())
    if not worst <= slack * largest:
        raise SystemExit(f"the block differs from diffusers' by {worst:.3g} where {largest:.3g} is the largest value")

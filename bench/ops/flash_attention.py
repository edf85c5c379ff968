from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.case import BACKWARD, BOTH, FORWARD, Case, Peer, Size, joined, leaf, normal
from bench.gpu_peers import cudnn_peer, flash_attn_peer
from uvg_engine import ops

CONDITION = 512  # keys of cross-attention, as Wan has them
LENGTHS = ("L1024", "L2048", "L4096")
REFERENCE_ROWS = 1500  # on the CPU: longer samples would take the reference minutes


class Attention(nn.Module):
    """On dense samples [B, N, L, H]; gathering them is not timed."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)


def make(size: Size, dtype: torch.dtype, head: int) -> tuple[Any, ...]:
    q, k, v = (normal(dtype, size.rows, size.width // head, head, scale=s) for s in (1.0, 0.9, 0.8))
    return q, k, v, size.layout.query_spans, size.layout.key_spans


def make_cross(size: Size, dtype: torch.dtype, head: int) -> tuple[Any, ...]:
    q = normal(dtype, size.rows, size.width // head, head)
    keys = size.samples * CONDITION
    k, v = (normal(dtype, keys, size.width // head, head, scale=s) for s in (0.9, 0.8))
    spans = torch.arange(0, keys, CONDITION, dtype=torch.int32)[:, None, None]
    return q, k, v, size.layout.query_spans, torch.cat([spans, torch.full_like(spans, CONDITION)], -1)


def torch_peer(size: Size, q: Tensor, k: Tensor, v: Tensor, *spans: Tensor) -> Peer:
    def dense(x: Tensor) -> Tensor:
        if len(x) == size.rows:
            x = torch.cat(size.by_modality(x), dim=1)
        else:
            x = x.unflatten(0, (size.samples, -1))
        return leaf(x.transpose(1, 2))

    def restore(out: Tensor) -> Tensor:
        video, text = out.transpose(1, 2).split([size.video, size.text], dim=1)
        return joined((video, text))

    return Peer(Attention(), tuple(dense(x) for x in (q, k, v)), restore)


def work(keys: int | None, size: Size, item: int) -> tuple[float, float]:
    queries = size.rows / size.samples
    flops = 4 * size.samples * queries * (keys or queries) * size.width
    return flops, 2 * item * size.samples * (queries + (keys or queries)) * size.width


def truth(size: Size, device: str) -> str:
    """On the CPU torch's kernel for what would take the reference too long; `sdpa` has no other device."""
    return "sdpa" if device == "cpu" and size.rows // size.samples >= REFERENCE_ROWS else "reference"


def case(name: str, head: int, cross: bool, sizes: tuple[str, ...]) -> Case:
    return Case(
        ops.flash_attention,
        shape=lambda size: f"B={size.samples} L={size.rows // size.samples} N={size.width // head} H={head}",
        make=partial(make_cross if cross else make, head=head),
        work=partial(work, CONDITION if cross else None),
        peers={
            "torch": torch_peer,
            "flash_attn.flash_attn_func": lambda *args: flash_attn_peer(torch_peer(*args)),
            "torch.cudnn": lambda *args: cudnn_peer(torch_peer(*args)),
        },
        compiled_by=("inductor", "openvino"),
        name=name,
        sizes=sizes,
        passes=(FORWARD, BACKWARD, BOTH),
        backward=(2.5, 2.0),
        truth=truth,
    )


CASES = (
    case("self", 128, False, ("1.3b-2560", *LENGTHS)),
    case("self H=64", 64, False, LENGTHS[1:2]),
    case("cross", 128, True, LENGTHS[1:2]),
)

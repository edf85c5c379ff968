from __future__ import annotations

from torch import Tensor

from bench.case import Case, Peer, Size, leaf, normal
from uvg_engine import ops

EXPERTS, TOP_K = 64, 2


def torch_peer(size: Size, logits: Tensor, top_k: int) -> Peer:
    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = logits.float().softmax(-1).topk(top_k)
        return weights / weights.sum(-1, keepdim=True), experts

    return Peer(route, (leaf(logits),))


CASES = (
    Case(
        ops.moe_route,
        shape=lambda size: f"T={size.rows} E={EXPERTS} K={TOP_K}",
        make=lambda size, dtype: (normal(dtype, size.rows, EXPERTS), TOP_K),
        work=lambda size, item: (5 * size.rows * EXPERTS, size.rows * (item * EXPERTS + 8 * TOP_K)),
        peers={"torch": torch_peer},
        agree=0.99,
    ),
)

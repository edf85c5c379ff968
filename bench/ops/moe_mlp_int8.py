from __future__ import annotations

from bench.case import FORWARD, IN_BYTES, Case, Peer
from bench.ops.moe_mlp import make, torch_peer
from uvg_engine import ops

CASES = (
    Case(
        ops.moe_mlp_int8,
        shape=lambda size: f"T={size.rows} D={size.width} F={size.hidden} E=2",
        make=make,
        work=lambda size, item: (4 * size.rows * size.width * size.hidden, 4 * size.width * size.hidden),
        peers={"torch": torch_peer, "full": lambda size, *inputs: Peer(ops.moe_mlp, inputs)},
        passes=(FORWARD,),
        slack=IN_BYTES,
    ),
)

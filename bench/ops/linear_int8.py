from __future__ import annotations

from bench.case import FORWARD, IN_BYTES, Case, Peer
from bench.ops.linear import make, torch_peer
from uvg_engine import ops

CASES = (
    Case(
        ops.linear_int8,
        shape=lambda size: f"T={size.rows} D={size.width} F={size.width}",
        make=make,
        work=lambda size, item: (2 * size.rows * size.width**2, size.width * (2 * item * size.rows + size.width)),
        peers={"torch": torch_peer, "full": lambda size, *inputs: Peer(ops.linear, inputs)},
        passes=(FORWARD,),
        slack=IN_BYTES,
    ),
)

from __future__ import annotations

from dataclasses import replace

from bench.case import FORWARD, IN_BYTES, Peer
from bench.ops import flash_attention
from uvg_engine import ops


def full_peer(size, *inputs) -> Peer:
    return Peer(ops.flash_attention, inputs)


CASES = tuple(
    replace(
        case,
        call=ops.flash_attention_int8,
        peers={**case.peers, "full": full_peer},
        passes=(FORWARD,),
        truth=lambda size, device: "torch",
        slack=IN_BYTES,
    )
    for case in flash_attention.CASES
)

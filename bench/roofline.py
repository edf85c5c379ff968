"""What a compiled kernel may reach on a chip: occupancy, and the roof that bounds its time. Nothing here was measured.

Peaks are those of the makers' data sheets (dense bf16 tensor cores, HBM); a kernel reaches less. So a predicted time
is a floor, for ranking and for noticing a regression.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.aot import Compiled

LAUNCH = 2e-6  # seconds: a launch is told no shorter time than this


@dataclass(frozen=True)
class Chip:
    """Peaks of one GPU, from its data sheet."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    bandwidth: float  # bytes a second
    tensor: float  # bf16 FLOP a second, dense
    shared: int  # bytes of shared memory of a multiprocessor


CHIPS = (
    Chip("A100", (8, 0), 108, 2.039e12, 312e12, 167_936),
    Chip("H100", (9, 0), 132, 3.35e12, 989e12, 233_472),
    Chip("H200", (9, 0), 132, 4.8e12, 989e12, 233_472),
    Chip("B200", (10, 0), 148, 8.0e12, 2250e12, 233_472),
)
_REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32  # of a multiprocessor, the same on all of them
_RESERVED = 1024  # bytes of shared memory that the system takes of each block


def blocks_per_sm(compiled: Compiled, chip: Chip) -> int:
    """Blocks that a multiprocessor holds at once: the least of what registers, shared memory and warps allow."""
    per_warp = -(-compiled.registers * 32 // 256) * 256
    return min(
        _REGISTERS // (per_warp * compiled.warps),
        chip.shared // (compiled.shared + _RESERVED),
        _WARPS // compiled.warps,
        _BLOCKS,
    )


def predicted(compiled: Compiled, chip: Chip) -> tuple[float, str]:
    """(seconds, the roof that bounds them: "memory", "tensor cores" or "launch")."""
    roofs = {
        "memory": compiled.bytes_moved / chip.bandwidth,
        "tensor cores": compiled.flops / chip.tensor,
        "launch": LAUNCH,
    }
    bound = max(roofs, key=lambda name: roofs[name])
    return roofs[bound], bound


def table(compiled: Sequence[Compiled]) -> Iterator[str]:
    """Lines of a Markdown table, one for each kernel, case and architecture."""
    yield (
        "| kernel | case | sm | registers | spills | shared | warps | blocks an SM | warps of 64 | instructions | "
        "bytes a program | FLOP a program | predicted |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for one in compiled:
        chips = [chip for chip in CHIPS if chip.capability == one.capability]
        held = blocks_per_sm(one, chips[0])
        mix = one.sass()
        spills = one.stack + mix["LDL"] + mix["STL"]
        times = "; ".join(
            f"{c.name} {seconds * 1e6:.0f} us, {bound}" for c in chips for seconds, bound in [predicted(one, c)]
        )
        told = " ".join(f"{name} {count}" for name, count in mix.most_common(6))
        yield (
            f"| `{one.kernel}` | {one.case} | {one.capability[0]}{one.capability[1]} | {one.registers} | {spills} | "
            f"{one.shared} | {one.warps} | {held} | {held * one.warps} | {sum(mix.values())}: {told} | "
            f"{one.bytes_moved // one.programs:,} | {one.flops / one.programs:,.0f} | {times} |"
        )

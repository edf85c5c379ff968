"""What a compiled kernel may reach on a chip: occupancy, and the roof that bounds its time. Nothing here was measured.

Peaks are those of the makers' data sheets (dense bf16 tensor cores, fp32 FMA units, HBM); a kernel reaches less. So a
predicted time is a floor, for ranking and for noticing a regression.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench import occupancy
from uvg_engine.backends import gpu_limits

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
    tensor: float  # bf16 FLOP a second, dense; half of it in TF32
    fma: float  # fp32 FLOP a second without tensor cores
    shared: int  # bytes of shared memory of a multiprocessor


CHIPS = (
    Chip("A100", (8, 0), 108, 2.039e12, 312e12, 19.5e12, 167_936),
    Chip("H100", (9, 0), 132, 3.35e12, 989e12, 67e12, 233_472),
    Chip("H200", (9, 0), 132, 4.8e12, 989e12, 67e12, 233_472),
    Chip("B200", (10, 0), 148, 8.0e12, 2250e12, 75e12, 233_472),
)
_TENSOR = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}  # dense bf16 FLOP of a multiprocessor in a clock
_FMA = {(8, 0): 128, (9, 0): 256, (10, 0): 256}  # fp32 FLOP of its FMA units in a clock


def chips() -> tuple[Chip, ...]:
    """The data sheets, and the GPUs of this machine by what cuda-python reads from them."""
    return (*CHIPS, *(chip_of(one) for one in gpu_limits.limits()[0] if one.capability in _TENSOR))


def chip_of(found: gpu_limits.Limits) -> Chip:
    """A GPU's peaks by its clocks: its data sheet's, where that counts with the same clocks."""
    tensor = float(_TENSOR[found.capability]) * found.num_sms * found.clock
    name = f"{found.name} (here)"
    fma = float(_FMA[found.capability]) * found.num_sms * found.clock
    return Chip(name, found.capability, found.num_sms, found.bandwidth, tensor, fma, found.shared_per_sm)


def blocks_per_sm(compiled: Compiled, chip: Chip) -> int:
    """Blocks that a multiprocessor holds at once."""
    launch = occupancy.Launch(32 * compiled.warps, compiled.registers, compiled.shared)
    return occupancy.blocks_per_sm(chip.capability, chip.shared, [launch])[0]


def predicted(compiled: Compiled, chip: Chip) -> tuple[float, str]:
    """(seconds, the roof that bounds them: "memory", that of the arithmetic, or "launch")."""
    units, peak = {
        None: ("FMA units", chip.fma),
        "tf32": ("tensor cores in TF32", chip.tensor / 2),
        "16-bit": ("tensor cores", chip.tensor),
    }[compiled.tensor_cores]
    roofs = {"memory": compiled.bytes_moved / chip.bandwidth, units: compiled.flops / peak, "launch": LAUNCH}
    bound = max(roofs, key=lambda name: roofs[name])
    return roofs[bound], bound


def table(compiled: Sequence[Compiled]) -> Iterator[str]:
    """Lines of a Markdown table, one for each kernel, case and architecture."""
    yield (
        "| kernel | case | sm | registers | spills | shared | warps | blocks an SM | warps of 64 | instructions | "
        "bytes a tile | FLOP a tile | predicted |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a disassembler
        mixes = list(pool.map(lambda one: one.sass(), compiled))
    for one, mix in zip(compiled, mixes, strict=True):
        mine = [chip for chip in chips() if chip.capability == one.capability]
        held = blocks_per_sm(one, mine[0])
        spills = one.stack + mix["LDL"] + mix["STL"]
        times = "; ".join(
            f"{c.name} {seconds * 1e6:.0f} us, {bound}" for c in mine for seconds, bound in [predicted(one, c)]
        )
        told = " ".join(f"{name} {count}" for name, count in mix.most_common(6))
        yield (
            f"| `{one.kernel}` | {one.case} | {one.capability[0]}{one.capability[1]} | {one.registers} | {spills} | "
            f"{one.shared} | {one.warps} | {held} | {held * one.warps} | {sum(mix.values())}: {told} | "
            f"{one.bytes_moved // one.tiles:,} | {one.flops / one.tiles:,.0f} | {times} |"
        )

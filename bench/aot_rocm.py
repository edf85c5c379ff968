"""Compile the launches of the Triton kernels as they are on ROCm, for AMD's MI300 (gfx942), without a GPU.

`python -m bench.aot_rocm` prints registers, spills and shared memory of each; nothing was run on such a GPU.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import aot

ARCH, WAVE = "gfx942", 64  # lanes of a wave
SHARED_LIMIT = 65_536  # bytes of a block


@dataclass(frozen=True)
class Compiled:
    """One kernel of one case. scratch: bytes of a lane in memory, what was spilled."""

    kernel: str
    case: str
    registers: int
    scratch: int
    shared: int

    def faults(self) -> list[str]:
        """What would keep it from being launched."""
        over = f"{self.kernel} ({self.case}) wants {self.shared} bytes of shared memory of {SHARED_LIMIT}"
        return [over] if self.shared > SHARED_LIMIT else []


class _Driver(aot._Driver):
    """As a ROCm device: configurations are those of sm_80."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("hip", ARCH, WAVE)


def compile_op(op: str) -> list[Compiled]:
    """Every kernel of every case of `op`, each specialisation once."""
    from triton.runtime import driver

    from uvg_engine.kernels import _launch

    driver.set_active(_Driver(_launch.SM80))
    found: dict[str, Compiled] = {}
    for case in aot.cases(op):
        if _launch.SM80 not in case.capabilities:
            continue
        with _launch.recording(_launch.SM80) as launches:
            case.call()
        for launch in launches:
            options = {name: value for name, value in launch.options.items() if name != "maxnreg"}
            binary = launch.kernel.run(
                *launch.args, grid=launch.grid, warmup=True, **{**_launch.EVERY_LAUNCH, **options}
            )
            text = binary.asm["amdgcn"]
            registers, scratch = (
                int(re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.M)[1])
                for name in ("vgpr_count", "private_segment_fixed_size")
            )
            found.setdefault(binary.hash, Compiled(launch.name, case.name, registers, scratch, binary.metadata.shared))
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each; returns 1 where one could not be launched."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot_rocm", description=__doc__)
    parser.add_argument("op", nargs="*", help="all that have kernels if none is named")
    args = parser.parse_args(arguments)
    if strangers := sorted(set(args.op) - set(aot.ops())):
        parser.error(f"no kernel module here is called {', '.join(strangers)}; have {', '.join(aot.ops())}")
    compiled = [one for op in args.op or aot.ops() for one in compile_op(op)]
    print("kernel, case, vector registers, spilled bytes a lane, shared bytes")
    for one in compiled:
        print(f"{one.kernel}, {one.case}, {one.registers}, {one.scratch}, {one.shared}", flush=True)
    spilled = sum(bool(one.scratch) for one in compiled)
    print(f"{len(compiled)} kernels for {ARCH}, {spilled} with spills")
    faults = [fault for one in compiled for fault in one.faults()]
    print("\n".join(faults), file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())

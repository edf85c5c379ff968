"""Compile every Triton kernel for sm_80, sm_90 and sm_100 without a GPU, and look into what came out.

A kernel module's `AOT_CASES` call its host functions on meta tensors; what they would launch is compiled here, with the
arguments specialised as Triton does it. `python -m bench.aot` prints the table of docs/gpu_static_report.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import math
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench import roofline
from bench.pages import write_part

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
# Bytes of a block, the most a launch may ask for. What serves sm_80 serves 8.6, 8.9 and 12.x too, which have the least.
SHARED_LIMIT = {(8, 0): 101_376, (9, 0): 232_448, (10, 0): 232_448}
DOT = {(8, 0): r"mma\.sync", (9, 0): r"wgmma\.mma_async|mma\.sync", (10, 0): r"tcgen05\.mma|mma\.sync"}
BEST_DOT = {(8, 0): r"mma\.sync", (9, 0): r"wgmma\.mma_async", (10, 0): r"tcgen05\.mma"}
TMA = r"cp\.async\.bulk\.tensor"
_WIDTH = r"(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfus](\d+)\b"
_SINGLE_16_BIT = r"(?:ld|st)\.global(?:\.(?!v\d)\w+(?:::\w+)*)*?\.[bfus]16\b"
_FUSIBLE = r"\b(?:fma\.rn|mad\.rn|mul|add|sub)(?:\.ftz)?\.f(?:16|32|64)(?:x2)?\b"  # without .rn, ptxas may fuse it
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_MARKS = {  # of a program's lines and blocks, in its digest
    **dict.fromkeys((tokenize.COMMENT, tokenize.NL), ""),
    **{tokenize.NEWLINE: ";", tokenize.INDENT: "{", tokenize.DEDENT: "}"},
}
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)", re.M)


@dataclass(frozen=True)
class Compiled:
    """One kernel of one case on one architecture."""

    op: str
    case: str
    kernel: str
    capability: tuple[int, int]
    grid: tuple[int, ...]
    options: dict[str, Any]
    registers: int
    stack: int  # bytes of a thread in local memory: what was spilled
    shared: int  # bytes of a block
    ptx: str
    cubin: bytes
    bytes_moved: int  # every tensor of the launch once
    flops: float
    expects: tuple[str, ...]
    tiles: int  # of the launch: its programs, but of a persistent kernel what they walk over
    held: int = 0  # programs that a persistent kernel starts for each multiprocessor

    @property
    def warps(self) -> int:
        return self.options["num_warps"]

    @property
    def where(self) -> str:
        return f"{self.kernel} ({self.case}) on sm_{self.capability[0]}{self.capability[1]}"

    @property
    def tensor_cores(self) -> str | None:
        """What the products are made of: "16-bit", "tf32", or None where there are no tensor-core instructions."""
        products = re.findall(rf"(?:{DOT[self.capability]})\S*", self.ptx)
        if not products:
            return None
        return "tf32" if all("tf32" in product for product in products) else "16-bit"

    def faults(self) -> Iterator[str]:
        """What this kernel should not have, or lacks."""
        if self.stack:
            yield f"{self.where} spills: {self.stack} bytes of stack"
        if self.shared > SHARED_LIMIT[self.capability]:
            yield f"{self.where} wants {self.shared} bytes of shared memory of {SHARED_LIMIT[self.capability]}"
        if "dot" in self.expects and not re.search(BEST_DOT[self.capability], self.ptx):
            yield f"{self.where} has no {BEST_DOT[self.capability]}"
        if "mma" in self.expects and not self.tensor_cores:
            yield f"{self.where} has no {DOT[self.capability]}"
        if {"dot", "mma"}.isdisjoint(self.expects) and self.tensor_cores:
            yield f"{self.where} has tensor-core instructions that its case does not tell of"
        if "tma" in self.expects and self.capability >= (9, 0) and not re.search(TMA, self.ptx):
            yield f"{self.where} has no {TMA}"
        if "wide" in self.expects and wide_share(self.ptx, "ld|st") < 0.75:
            yield f"{self.where} moves {wide_share(self.ptx, 'ld|st'):.0%} of its bytes by 128-bit accesses"
        if "vector" in self.expects and wide_share(self.ptx, "st") < 0.75:
            yield f"{self.where} stores {wide_share(self.ptx, 'st'):.0%} of its bytes by 128-bit accesses"
        if "vector" in self.expects and (found := re.search(_SINGLE_16_BIT, self.ptx)):
            yield f"{self.where} has a 16-bit access: {found.group()}"
        if "rounded" in self.expects and (found := re.search(_FUSIBLE, self.ptx)):
            yield f"{self.where} may fuse a product with a sum: {found.group()}"

    def sass(self) -> Counter[str]:
        """How often each machine instruction stands in the code, by its first word."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            text = _tool("nvdisasm", "-c", file.name)
        return Counter(name.split(".")[0] for name in _SASS.findall(text))


def wide_share(ptx: str, kinds: str) -> float:
    """Bytes of the global accesses (kinds: "ld", "st", "ld|st") that are 128-bit ones; each instruction counts once."""
    accesses = re.findall(rf"(?:{kinds})\.global{_WIDTH}", ptx)
    sizes = [int(count or 1) * int(bits) for count, bits in accesses]
    return sum(size for size in sizes if size >= 128) / max(1, sum(sizes))


class _Driver:
    """Stands in for a GPU's driver while Triton specialises arguments and compiles."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

    def get_current_device(self) -> Any:
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: Any) -> int:
        return 0


def ops() -> list[str]:
    """The kernel modules that have cases."""
    stems = sorted(path.stem for path in KERNELS.glob("*.py") if not path.stem.startswith("_"))
    return [stem for stem in stems if hasattr(_module(stem), "AOT_CASES")]


def cases(op: str) -> tuple[Any, ...]:
    """The `AOT_CASES` of an op's kernel module."""
    return _module(op).AOT_CASES


def _module(op: str) -> Any:
    return importlib.import_module(f"uvg_engine.kernels.{op}")


def compile_op(op: str, capability: tuple[int, int], every: bool = True) -> list[Compiled]:
    """Every kernel of every case of `op` (or of the tested ones) for one architecture, each specialisation once."""
    from triton.runtime import driver

    from uvg_engine.kernels import _launch

    driver.set_active(_Driver(capability))
    found: dict[Any, Compiled] = {}
    for case in cases(op):
        if capability not in case.capabilities or not (every or case.tested):
            continue
        with _launch.recording(capability) as launches:
            case.call()
        for launch in launches:
            options = {**_launch.EVERY_LAUNCH, **launch.options}
            binary = launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **options)
            if binary.hash in found:
                continue
            registers, stack = _resources(binary.asm["cubin"])
            tensors = {id(x): x for x in _launch.tensors_of(launch.args)}.values()
            persistent, given = launch.name in case.tiles, _launch.programs(torch.device("meta"), 1)
            found[binary.hash] = Compiled(
                *(op, case.name, launch.name, capability, launch.grid, {"num_warps": 4, **launch.options}),
                *(registers, stack, binary.metadata.shared, binary.asm["ptx"], binary.asm["cubin"]),
                sum(x.numel() * x.element_size() for x in tensors),
                case.flops.get(launch.name, 0.0),
                tuple(case.expects[launch.name]),
                case.tiles[launch.name](launch) if persistent else math.prod(launch.grid),
                launch.grid[0] // given if persistent else 0,
            )
    return list(found.values())


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _tool("cuobjdump", "-res-usage", file.name)
    ((registers, stack, _, local),) = _RESOURCES.findall(text)
    return int(registers), int(stack) + int(local)


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def digest() -> str:
    """Of all that decides what is compiled: the text of kernels/ without comments and layout, and Triton's version."""
    import triton

    parts = [triton.__version__]
    for path in sorted(KERNELS.glob("*.py")):
        with tokenize.open(path) as file:
            parts += [path.name, *(_MARKS.get(t.type, t.string) for t in tokenize.generate_tokens(file.readline))]
    return hashlib.sha256("".join("".join(parts).split()).encode()).hexdigest()[:16]


def compile_all(names: Sequence[str], capabilities: Sequence[tuple[int, int]], workers: int = 2) -> list[Compiled]:
    """`compile_op` of each op and architecture, in processes of their own."""
    jobs = [(op, capability) for op in names for capability in capabilities]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        done = [pool.submit(compile_op, *job) for job in jobs]
        return [compiled for job in done for compiled in job.result()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or write it into a page; returns 1 where a kernel has a fault, and writes nothing then."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("op", nargs="*", help="all that have kernels if none is named")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page, between its marks")
    args = parser.parse_args(arguments)
    if strangers := sorted(set(args.op) - set(ops())):
        parser.error(f"no kernel module here is called {', '.join(strangers)}; have {', '.join(ops())}")
    if args.write and args.op:
        parser.error("a page is written whole: name no op beside --write")
    compiled = compile_all(args.op or ops(), sorted(SHARED_LIMIT))
    text = "\n".join(roofline.table(compiled))
    faults = [fault for one in compiled for fault in one.faults()]
    if not args.write:
        print(text)
    elif not faults:
        write_part(args.write, "triton", f"Of the kernels with the digest `{digest()}`.\n\n{text}")
    print("\n".join(faults), file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())

"""What nvcc made of the CUDA kernels, read from `uvg_engine._cuda` with cuobjdump: no GPU and no driver.

`python -m bench.cuda_static` prints the table, `--write docs/gpu_static_report.md` puts it into the report.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from bench import cuda_launches, occupancy, roofline
from bench.pages import write_part
from uvg_engine.backends import native

COUNTED = ("HMMA", "LDSM", "LDGSTS", "LDG.128", "STG.128", "LDL", "STL")
_FUNCTION = re.compile(r"Function : (\S+)")
_USAGE = re.compile(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)")
_BOUNDS = re.compile(r"\.entry (\w+)\([^{]*?\.minnctapersm (\d+)")
_ELF = re.compile(r"^arch = (sm_\w+)", re.M)


@dataclass
class Kernel:
    """One kernel of one architecture."""

    name: str  # demangled, without its parameters
    arch: str
    registers: int
    stack: int  # bytes of a thread
    meant: int  # blocks of a multiprocessor that __launch_bounds__ asks for, 1 without
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def vector(self) -> int | None:
        """Elements of one access, of a row kernel's template."""
        found = re.search(r"_kernel<.*, \(?(?:int\)?)?(\d+)>", self.name)
        return int(found.group(1)) if found and "flash_attention" not in self.name else None


def tool(name: str = "cuobjdump") -> str | None:
    """A program of the CUDA toolkit: on PATH, or of PyPI's wheels."""
    places = [str(Path(site, "nvidia", "cu13", "bin")) for site in sys.path if site]
    return shutil.which(name) or next((found for p in places if (found := shutil.which(name, path=p))), None)


def _run(*command: str, **kwargs: object) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, **kwargs).stdout  # type: ignore


def _demangled(names: list[str]) -> dict[str, str]:
    shown = _run("c++filt", input="\n".join(names)).splitlines()
    files = (re.search(r"_\d+_([a-z_]+)_cu_", name) for name in names)
    short = []
    for text, file in zip(shown, files, strict=True):
        text = re.sub(r"\(anonymous namespace\)::|uvg::cuda::|uvg::gpu::|uvg::|^void |_GLOBAL__N__\w+::", "", text)
        text = re.sub(r"\(.*\)$", "", re.sub(r"\((?:int|bool)\)", "", text))
        short.append(f"{file.group(1) if file else ''}: {text}".removeprefix(": "))
    return dict(zip(names, short, strict=True))


def kernels() -> list[Kernel]:
    """Every kernel of every architecture in the module. Raises RuntimeError without module or cuobjdump."""
    module, cuobjdump = native.cuda(), tool()
    if module is None or cuobjdump is None:
        raise RuntimeError(native.why_not_cuda() or "cuobjdump is not installed (extra cuda-build)")
    library = str(module.__file__)
    usage: dict[tuple[str, str], tuple[int, int]] = {}
    for part in re.split(r"^Fatbin elf code:", _run(cuobjdump, "--dump-resource-usage", library), flags=re.M)[1:]:
        arch = _ELF.search(part)
        for name, registers, stack, _ in _USAGE.findall(part):
            assert arch is not None
            usage[name, arch.group(1)] = int(registers), int(stack)
    names = _demangled(sorted({name for name, _ in usage}))
    meant = {name: int(blocks) for name, blocks in _BOUNDS.findall(_run(cuobjdump, "-ptx", library))}
    found = {key: Kernel(names[key[0]], key[1], *values, meant.get(key[0], 1)) for key, values in usage.items()}
    current, arch_name = None, ""
    for line in _run(cuobjdump, "-sass", library).splitlines():
        if header := _ELF.match(line):
            arch_name = header.group(1)
        elif function := _FUNCTION.search(line):
            current = found.get((function.group(1), arch_name))
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            parts = instruction.group(1).split(".")
            current.instructions[parts[0]] += 1
            if "128" in parts:
                current.instructions[f"{parts[0]}.128"] += 1
    return sorted(found.values(), key=lambda k: (k.name, k.arch))


def occupancies(all_kernels: list[Kernel]) -> list[int]:
    """Blocks of each kernel that a multiprocessor holds, launched as for the published model's widths."""
    held = {}
    for chip in roofline.CHIPS:
        arch = f"sm_{chip.capability[0]}{chip.capability[1]}"
        mine = [k for k in all_kernels if k.arch == arch]
        launches = [occupancy.Launch(*_launch(k)) for k in mine]
        held |= {
            (k.name, k.arch): n
            for k, n in zip(mine, occupancy.blocks_per_sm(chip.capability, chip.shared, launches), strict=True)
        }
    return [held[k.name, k.arch] for k in all_kernels]


def _launch(kernel: Kernel) -> tuple[int, int, int]:
    threads, shared = cuda_launches.launch_of(kernel.name)
    return threads, kernel.registers, shared


def table(all_kernels: list[Kernel]) -> str:
    """Markdown: a line for each kernel, values of the architectures beside each other."""
    blocks = dict(zip(((k.name, k.arch) for k in all_kernels), occupancies(all_kernels), strict=True))
    archs = sorted({k.arch for k in all_kernels}, key=lambda a: int(re.sub(r"\D", "", a)))
    head = ("kernel", "threads", "shared", "blocks meant", "blocks", f"registers, {', '.join(archs)}", *COUNTED)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(k.name for k in all_kernels):
        by_arch = {k.arch: k for k in all_kernels if k.name == name}
        mine = [by_arch[arch] for arch in archs if arch in by_arch]
        counts = [", ".join(str(k.instructions[what]) for k in mine) for what in COUNTED]
        counts = [c if c.strip("0, ") else "-" for c in counts]
        threads, shared = cuda_launches.launch_of(name)
        held = ", ".join(str(blocks[name, k.arch]) for k in mine)
        registers = ", ".join(str(k.registers) for k in mine)
        told = (f"`{name}`", str(threads), str(shared), str(mine[0].meant), held, registers, *counts)
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it into the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_static", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page, between its marks")
    args = parser.parse_args()
    text = table(kernels())
    if args.write:
        write_part(args.write, "cuda", text)
    else:
        print(text)


if __name__ == "__main__":
    main()

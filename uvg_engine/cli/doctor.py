"""`uvg doctor`: this machine, this installation, and which backend serves which op and why not the others."""

from __future__ import annotations

import dataclasses
import json as jsons
import os
import platform
from collections import defaultdict
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from uvg_engine.cli import _options as opt
from uvg_engine.cli._files import print_json

_PACKAGES = {  # what is not there, and what it is for
    "av": "video files",
    "pillow": "gif and png files",
    "scikit-learn": "the digits data set and uvg eval",
    "tensorboard": "uvg train",
    "diffusers": "Wan's VAE",
    "transformers": "Wan's text encoder",
    "triton": "GPU kernels",
    "flash-attn": "a library backend",
}


def doctor(json: opt.Json = False) -> None:
    """Tell machine, torch, native core, models, and which backend serves which op and why not the others."""
    report = examine()
    if json:
        print_json(report)
    else:
        _print(report)


def examine() -> dict[str, Any]:
    """Everything that `uvg doctor` tells, as plain values."""
    import torch

    from uvg_engine import __version__, backends

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "uvg_engine": {"version": __version__, "folder": str(Path(__file__).parents[1])},
        "machine": _machine(),
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "gpus": _gpus(),
        "native": _native(),
        "backends": {"order": list(backends.names()), "all": list(backends.ORDER)},
        "ops": _ops(devices),
        "packages": {name: _version(name) for name in _PACKAGES},
        "models": _models(),
    }


def _gpus() -> dict[str, Any]:
    """What cuda-python tells of the GPUs: limits and clocks, or why nothing."""
    from uvg_engine.backends import gpu_limits

    found, reason = gpu_limits.limits()
    told = [dataclasses.asdict(one) | {"bandwidth": one.bandwidth} for one in found]
    return {"reason": reason, "found": [one | {"clocks": gpu_limits.clocks(i)} for i, one in enumerate(told)]}


def _native() -> dict[str, Any]:
    from uvg_engine.backends import native

    found = {"description": native.describe(), **native.info()}
    return found | {"cuda": {"description": native.describe_cuda(), **found["cuda"]}}


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("UVG_", "OMP_", "MKL_"))},
    }


def _cpu_name() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _memory_gib() -> float | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal:"):
            return round(int(line.split()[1]) / 2**20, 1)
    return None


def _lines(path: str) -> list[str]:
    """Of a file that only Linux has; none elsewhere."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _version(package: str) -> str | None:
    try:
        return installed(package)
    except PackageNotFoundError:
        return None


def _models() -> list[dict[str, Any]]:
    """The models of the package; also one that is damaged, with what is wrong."""
    from uvg_engine.sampling.engine import EMBEDDED, ENGINE_FILE

    found = []
    for file in sorted(EMBEDDED.glob(f"*/{ENGINE_FILE}")):
        size = sum(path.stat().st_size for path in file.parent.rglob("*") if path.is_file())
        entry: dict[str, Any] = {"name": file.parent.name, "folder": str(file.parent), "bytes": size}
        try:
            defaults = jsons.loads(file.read_text(encoding="utf-8"))["defaults"]
            entry["clip"] = [defaults[name] for name in ("frames", "height", "width")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            entry["error"] = f"{type(error).__name__}: {error}"
        found.append(entry)
    return found


def _ops(devices: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Per op what each backend says to one small call, in fp32 and bf16 on each device."""
    import torch

    from uvg_engine.cli._op_calls import CALLS, ask

    calls = [(device, dtype) for device in devices for dtype in (torch.float32, torch.bfloat16)]
    return {
        op: [{"device": dev, "dtype": str(dtype)[6:], **ask(op, dev, dtype)} for dev, dtype in calls] for op in CALLS
    }


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for name, value in _facts(report):
        console.print(f"{name:<12} {value}", soft_wrap=True)
    console.print()
    console.print(_table(report["ops"]))
    for line in (*_refusals(report), *_orders(report)):
        console.print(line, soft_wrap=True)


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    machine, torch = report["machine"], report["torch"]
    cores = f"{machine['usable_cores']} of {machine['cores']} cores"
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    flags = [name for name, there in report["native"].get("cpu", {}).get("flags", {}).items() if there]
    facts = [
        ("uvg_engine", f"{report['uvg_engine']['version']} in {report['uvg_engine']['folder']}"),
        ("machine", f"{machine['cpu']}, {cores}{memory}, {machine['system']} {machine['architecture']}"),
        ("CPU has", ", ".join(flags) or f"(the native core would tell) torch says {torch['cpu_capability']}"),
        ("python", machine["python"]),
        ("torch", f"{torch['version']}, {torch['threads']} threads, {torch['cpu_capability']}"),
        ("GPU", ", ".join(torch["gpus"]) or "none that torch can use"),
        *(("GPU limits", line) for line in _limits(report["gpus"])),
        ("native core", report["native"]["description"]),
        ("CUDA kernels", report["native"]["cuda"]["description"]),
        ("backends", f"asked in this order: {', '.join(report['backends']['order'])}"),
        ("environment", ", ".join(f"{k}={v}" for k, v in machine["environment"].items()) or "nothing set"),
    ]
    for name, version in report["packages"].items():
        facts.append(("package", f"{name} {version or 'is not installed'} ({_PACKAGES[name]})"))
    for model in report["models"]:
        size = f"{model['bytes'] / 2**20:.1f} MiB"
        clip = model.get("error") or "{} frames of {}x{}".format(*model["clip"])
        facts.append(("model", f"{model['name']}, {size}, {clip}"))
    if not report["models"]:
        facts.append(("model", "none in the package; --model takes a folder"))
    return facts


def _limits(gpus: dict[str, Any]) -> list[str]:
    """A line for each GPU, or the reason why there is none."""
    return [gpus["reason"]] if gpus["reason"] else [_limits_line(one) for one in gpus["found"]]


def _limits_line(one: dict[str, Any]) -> str:
    clocks = one["clocks"]
    now = clocks if isinstance(clocks, str) else f"now {clocks['sm']} of {clocks['sm_max']} MHz"
    return (
        f"{one['name']}, sm_{one['capability'][0]}{one['capability'][1]}, {one['num_sms']} multiprocessors with "
        f"{one['shared_per_sm'] >> 10} KiB of shared memory, {one['memory'] / 2**30:.0f} GiB at "
        f"{one['bandwidth'] / 1e9:.0f} GB/s, L2 {one['l2'] / 2**20:.0f} MiB, {now}"
    )


def _table(ops: dict[str, list[dict[str, Any]]]) -> Any:
    from rich.table import Table

    table = Table(title="which backend serves the op")
    table.add_column("op")
    for call in next(iter(ops.values())):
        table.add_column(f"{call['dtype']} on {call['device']}")
    for op, calls in ops.items():
        table.add_row(op, *(call["served_by"] if not call["error"] else f"fails: {call['error']}" for call in calls))
    return table


def _orders(report: dict[str, Any]) -> list[str]:
    """Why the backends are asked in another order than the usual one: on a GPU, by op and shape."""
    usual = ", ".join(report["backends"]["order"])
    lines = []
    for op, answers in report["ops"].items():
        for call in answers:
            order, reason = (call["why"].splitlines() + ["", ""])[:2]
            if call["device"] != "cpu" and order not in ("", f"asked: {usual}"):
                lines.append(f"{op} ({call['dtype']} on {call['device']}): {order}; {reason}")
    return lines


def _refusals(report: dict[str, Any]) -> list[str]:
    """Why not the others, a line for each backend and reason, with the calls it concerns."""
    order, everyone = report["backends"]["order"], report["backends"]["all"]
    lines = [f"{name}: left out by UVG_BACKENDS" for name in everyone if name not in order]
    calls: dict[tuple[str, str], list[str]] = defaultdict(list)
    for op, answers in report["ops"].items():
        for call in answers:
            for backend, reason in call["refused"].items():
                lacks = reason == f"backend {backend} has no kernel for {op}"
                calls[backend, "no kernel" if lacks else reason].append(f"{op} ({call['dtype']} on {call['device']})")
    every = {op: len(answers) for op, answers in report["ops"].items()}
    for (backend, reason), where in calls.items():
        names = [call.partition(" ")[0] for call in where]
        whole = all(names.count(name) == every[name] for name in names)
        lines.append(f"{backend}: {reason}: {', '.join(dict.fromkeys(names if whole else where))}")
    return lines

"""What NVIDIA's driver tells of the GPUs, through cuda-python (extra `cuda`): limits of the device, and its clocks.

For `uvg doctor` and the benchmarks. No kernel needs it, so nothing here fails where package or driver are missing:
there is a reason instead.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from uvg_engine.backends.devices import Capability


@dataclass(frozen=True)
class Limits:
    """Attributes of one GPU. Sizes in bytes, clocks in Hz."""

    name: str
    capability: Capability
    num_sms: int
    clock: int  # of the multiprocessors, the highest
    memory: int
    memory_clock: int
    bus: int  # bits
    l2: int
    shared_per_sm: int
    shared_per_block: int  # the most that a launch may ask for
    shared_reserved: int  # of each block, by the system
    registers_per_sm: int
    threads_per_sm: int
    blocks_per_sm: int

    @property
    def bandwidth(self) -> float:
        """Bytes a second: two transfers a clock over the whole bus."""
        return 2.0 * self.memory_clock * self.bus / 8


_ATTRIBUTES = {  # field of Limits: (name in cudaDeviceAttr, unit)
    "num_sms": ("MultiProcessorCount", 1),
    "clock": ("ClockRate", 1000),
    "memory_clock": ("MemoryClockRate", 1000),
    "bus": ("GlobalMemoryBusWidth", 1),
    "l2": ("L2CacheSize", 1),
    "shared_per_sm": ("MaxSharedMemoryPerMultiprocessor", 1),
    "shared_per_block": ("MaxSharedMemoryPerBlockOptin", 1),
    "shared_reserved": ("ReservedSharedMemoryPerBlock", 1),
    "registers_per_sm": ("MaxRegistersPerMultiprocessor", 1),
    "threads_per_sm": ("MaxThreadsPerMultiProcessor", 1),
    "blocks_per_sm": ("MaxBlocksPerMultiprocessor", 1),
}


def _binding(name: str) -> ModuleType | str:
    """The module cuda.bindings.<name>, or why it is not there."""
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("cuda", "cuda.bindings", f"cuda.bindings.{name}"):
            raise
        what = "cuda-python" if name == "runtime" else f"cuda.bindings.{name}"
        return f"{what} is not installed (pip install 'uvg-engine[cuda]')"


def limits() -> tuple[list[Limits], str | None]:
    """(every GPU that CUDA sees, why there is none or None)."""
    runtime = _binding("runtime")
    if isinstance(runtime, str):
        return [], runtime
    error, count = runtime.cudaGetDeviceCount()
    if error != runtime.cudaError_t.cudaSuccess:
        told = runtime.cudaGetErrorString(error)[1]
        return [], f"cuda-python finds no GPU: {told.decode() if isinstance(told, bytes) else told}"
    return [_limits_of(runtime, index) for index in range(count)], None if count else "cuda-python finds no GPU"


def _limits_of(runtime: ModuleType, index: int) -> Limits:
    def checked(answer: tuple[Any, Any]) -> Any:
        error, value = answer
        if error != runtime.cudaError_t.cudaSuccess:
            raise RuntimeError(f"CUDA: {runtime.cudaGetErrorString(error)[1]!r}")
        return value

    def attribute(name: str) -> int:
        return int(
            checked(runtime.cudaDeviceGetAttribute(getattr(runtime.cudaDeviceAttr, f"cudaDevAttr{name}"), index))
        )

    found = checked(runtime.cudaGetDeviceProperties(index))
    return Limits(
        name=found.name.decode(),
        memory=int(found.totalGlobalMem),
        capability=(attribute("ComputeCapabilityMajor"), attribute("ComputeCapabilityMinor")),
        **{field: unit * attribute(name) for field, (name, unit) in _ATTRIBUTES.items()},
    )


def clocks(index: int = 0) -> dict[str, int] | str:
    """Clocks of a GPU at this moment, in MHz: {"sm", "sm_max", "memory", "memory_max"}, or why they are not known."""
    runtime = _binding("runtime")
    if isinstance(runtime, str):
        return runtime
    nvml = _binding("nvml")
    if isinstance(nvml, str):
        return nvml
    error, bus_id = runtime.cudaDeviceGetPCIBusId(32, index)
    if error != runtime.cudaError_t.cudaSuccess:
        return f"cuda-python finds no GPU {index}"
    missing = importlib.import_module("cuda.pathfinder").DynamicLibNotFoundError
    try:
        nvml.init_v2()
    except missing:
        return "the driver's library nvml is not here"
    try:
        # CUDA_VISIBLE_DEVICES renumbers CUDA's devices and not nvml's: the place on the bus is the same
        device = nvml.device_get_handle_by_pci_bus_id_v2(bus_id.decode().rstrip("\0"))
        # by value: 13.2 calls the members CLOCK_SM and CLOCK_MEM, 13.5 SM and MEM
        kinds = {"sm": nvml.ClockType(1), "memory": nvml.ClockType(2)}
        now = {name: nvml.device_get_clock_info(device, kind) for name, kind in kinds.items()}
        most = {f"{name}_max": nvml.device_get_max_clock_info(device, kind) for name, kind in kinds.items()}
        return now | most
    except nvml.NvmlError as refusal:  # a virtual GPU does not tell
        return f"nvml: {refusal}"
    finally:
        nvml.shutdown()

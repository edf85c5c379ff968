"""What cuda-python tells of GPUs reaches doctor, roofline and timing; where it is missing there is a reason."""

import dataclasses
import enum
import importlib
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_check, roofline, timing
from uvg_engine.backends import gpu_limits

doctor = importlib.import_module("uvg_engine.cli.doctor")  # the package has the command by this name

H100 = {  # as the driver tells them: clocks in kHz
    "MultiProcessorCount": 132,
    "ClockRate": 1_830_000,
    "MemoryClockRate": 2_619_000,
    "GlobalMemoryBusWidth": 5120,
    "L2CacheSize": 50 << 20,
    "MaxSharedMemoryPerMultiprocessor": 233_472,
    "MaxSharedMemoryPerBlockOptin": 232_448,
    "ReservedSharedMemoryPerBlock": 1024,
    "MaxRegistersPerMultiprocessor": 65_536,
    "MaxThreadsPerMultiProcessor": 2048,
    "MaxBlocksPerMultiprocessor": 32,
    "ComputeCapabilityMajor": 9,
    "ComputeCapabilityMinor": 0,
}


class NoDriver(RuntimeError):
    pass


class NvmlError(Exception):
    pass


class Runtime:
    """cuda.bindings.runtime on a machine with one H100."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)
    cudaDeviceAttr = SimpleNamespace(**{f"cudaDevAttr{name}": name for name in H100})
    error = 0

    def cudaGetDeviceCount(self):
        return self.error, None if self.error else 1

    def cudaGetErrorString(self, error):
        return 0, b"CUDA driver version is insufficient"

    def cudaDeviceGetAttribute(self, attribute, index):
        return 0, H100[attribute]

    def cudaGetDeviceProperties(self, index):
        return 0, SimpleNamespace(name=b"NVIDIA H100", totalGlobalMem=80 << 30)

    def cudaDeviceGetPCIBusId(self, length, index):
        return 0, b"0000:17:00.0\0\0"


class Nvml:
    """cuda.bindings.nvml on the same machine; what is left open has to be closed."""

    NvmlError = NvmlError
    ClockType = enum.IntEnum("ClockType", {"CLOCK_SM": 1, "CLOCK_MEM": 2})  # as 13.2 has it; 13.5 renamed the members
    opened = 0

    def init_v2(self):
        self.opened += 1

    def shutdown(self):
        self.opened -= 1

    def device_get_handle_by_pci_bus_id_v2(self, bus_id):
        assert bus_id == "0000:17:00.0" and self.opened
        return 7

    def device_get_clock_info(self, device, kind):
        return {1: 345, 2: 2619}[kind]

    def device_get_max_clock_info(self, device, kind):
        return {1: 1980, 2: 2619}[kind]


@pytest.fixture
def binding(monkeypatch):
    modules = {
        "cuda.bindings.runtime": Runtime(),
        "cuda.bindings.nvml": Nvml(),
        "cuda.pathfinder": SimpleNamespace(DynamicLibNotFoundError=NoDriver),
    }

    def import_module(name):
        if isinstance(modules[name], Exception):
            raise modules[name]
        return modules[name]

    monkeypatch.setattr(gpu_limits.importlib, "import_module", import_module)
    return modules


def test_limits_are_told_in_plain_units(binding):
    (found,), reason = gpu_limits.limits()
    assert reason is None and found.name == "NVIDIA H100" and found.capability == (9, 0)
    assert (found.clock, found.memory, found.l2) == (1_830_000_000, 80 << 30, 50 << 20)
    assert found.bandwidth == pytest.approx(3.35e12, rel=0.01)


def test_the_roofline_counts_the_chip_as_its_data_sheet_does(binding):
    here = roofline.chips()[-1]
    (sheet,) = (chip for chip in roofline.CHIPS if chip.name == "H100")
    assert here.name == "NVIDIA H100 (here)" and (here.capability, here.num_sms) == (sheet.capability, sheet.num_sms)
    assert here.bandwidth == pytest.approx(sheet.bandwidth, rel=0.01) and here.shared == sheet.shared
    assert here.tensor == pytest.approx(sheet.tensor, rel=0.01)


def test_clocks_are_those_of_the_device_on_its_bus(binding):
    assert gpu_limits.clocks(0) == {"sm": 345, "sm_max": 1980, "memory": 2619, "memory_max": 2619}
    assert binding["cuda.bindings.nvml"].opened == 0


def refuse(error):
    def function(*args):
        raise error

    return function


@pytest.mark.parametrize(
    "function, error, told",
    [
        ("init_v2", NoDriver("no"), "the driver's library nvml is not here"),
        ("device_get_clock_info", NvmlError("Not Supported"), "nvml: Not Supported"),
    ],
)
def test_clocks_that_nobody_tells_are_a_reason(binding, monkeypatch, function, error, told):
    nvml = binding["cuda.bindings.nvml"]
    monkeypatch.setattr(nvml, function, refuse(error))
    assert gpu_limits.clocks() == told and nvml.opened == 0


def test_without_package_or_driver_there_is_a_reason(binding):
    install = "cuda-python is not installed (pip install 'uvg-engine[cuda]')"
    binding["cuda.bindings.runtime"].error = 35
    assert gpu_limits.limits() == ([], "cuda-python finds no GPU: CUDA driver version is insufficient")
    assert roofline.chips() == roofline.CHIPS
    binding["cuda.bindings.runtime"] = ModuleNotFoundError("no", name="cuda")
    assert gpu_limits.limits() == ([], install) and gpu_limits.clocks() == install
    binding["cuda.bindings.runtime"] = ModuleNotFoundError("no", name="numpy")
    with pytest.raises(ModuleNotFoundError):
        gpu_limits.limits()


def test_this_machine_answers():
    found, reason = gpu_limits.limits()
    assert bool(found) != bool(reason) and isinstance(gpu_limits.clocks(), dict if found else str)


def test_doctor_tells_the_limits_or_the_reason(binding):
    (line,) = doctor._limits(doctor._gpus())
    assert line == (
        "NVIDIA H100, sm_90, 132 multiprocessors with 228 KiB of shared memory, 80 GiB at 3352 GB/s, L2 50 MiB, "
        "now 345 of 1980 MHz"
    )
    binding["cuda.bindings.runtime"].error = 35
    assert doctor._limits(doctor._gpus()) == ["cuda-python finds no GPU: CUDA driver version is insufficient"]
    assert gpu_check.limits() == "cuda-python finds no GPU: CUDA driver version is insufficient"


class Event:
    """A clock of the device that ticks with what it is given to do."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


def test_a_call_on_a_gpu_is_timed_alone_after_the_cache_was_overwritten(binding, monkeypatch):
    done = []

    def work(name, milliseconds):
        done.append(name)
        Event.now += milliseconds

    buffer = SimpleNamespace(zero_=lambda: work("flush", 5.0))
    sizes = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: work("ahead", 7.0))
    monkeypatch.setattr(torch, "empty", lambda size, **how: sizes.append(size) or buffer)
    timing._flush_buffer.cache_clear()
    try:
        assert timing.Clock("cuda").once(lambda: work("call", 2.0), repeats=3) == pytest.approx(2e-3)
    finally:
        timing._flush_buffer.cache_clear()
    assert done == ["ahead"] + ["flush", "call"] * 3 + ["wait"] and sizes == [2 * H100["L2CacheSize"]]
    binding["cuda.bindings.runtime"].error = 35
    timing._flush_buffer()
    timing._flush_buffer.cache_clear()
    assert sizes[-1] == 2 * timing.UNKNOWN_L2


def test_limits_are_plain_values(binding):
    (found,), _ = gpu_limits.limits()
    assert {type(value) for value in dataclasses.asdict(found).values()} == {str, int, tuple}

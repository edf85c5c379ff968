"""What a backend asks about an NVIDIA GPU, and how the host talks to one without waiting for it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Capability = tuple[int, int]
OLDEST: Capability = (8, 0)  # of bf16 tensor cores and asynchronous copies
MAX_GRID = 65535  # blocks along the second axis of a grid


@functools.cache
def capability(device: torch.device) -> Capability:
    """Compute capability, (9, 0) for an H100."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for."""
    found = torch.cuda.get_device_properties(device)
    return getattr(
        found, "shared_memory_per_block_optin", 99 << 10
    )  # a torch that does not tell: the least from 8.0 on


def too_old(device: torch.device) -> str | None:
    """Why a GPU is older than our kernels and the libraries serve, or None."""
    major, minor = capability(device)
    return None if (major, minor) >= OLDEST else f"compute capability {major}.{minor}; from {OLDEST[0]}.{OLDEST[1]} on"


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: its memory has values only when it is replayed, so nothing is kept."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def put(x: Tensor, device: torch.device) -> Tensor:
    """x, of the host, on a device. A GPU gets it from pinned memory, so that the host does not wait for what it asked
    of the GPU before; in a captured graph, which would read that memory anew at each replay, it is torch's own copy."""
    if device.type != "cuda" or not x.is_cpu or capturing(device):
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def fetch(x: Tensor) -> Callable[[], Tensor]:
    """x as it is now, on the host: asked for at once, waited for by the call that takes it."""
    if not x.is_cuda:
        host = x.to("cpu", copy=True)
        return lambda: host
    host, arrived = torch.empty_like(x, device="cpu", pin_memory=True), torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    arrived.record(torch.cuda.current_stream(x.device))

    def taken() -> Tensor:
        arrived.synchronize()
        return host

    return taken

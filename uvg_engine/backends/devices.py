"""What a backend asks about an NVIDIA GPU."""

from __future__ import annotations

import functools

import torch

Capability = tuple[int, int]
OLDEST: Capability = (8, 0)  # of bf16 tensor cores and asynchronous copies


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

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


def too_old(device: torch.device) -> str | None:
    """Why a GPU is older than our kernels and the libraries serve, or None."""
    major, minor = capability(device)
    return None if (major, minor) >= OLDEST else f"compute capability {major}.{minor}; from {OLDEST[0]}.{OLDEST[1]} on"

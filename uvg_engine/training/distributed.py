"""Data-parallel training: one process a core or machine, gradients averaged once a step.

Start with `torchrun --nproc-per-node N -m uvg_engine.cli train ...`. Each rank takes its part of every batch: a run
with N ranks computes what a single process computes with N times `accumulate`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, distributed


def start() -> tuple[int, int]:
    """(rank, world size); joins the process group that torchrun announces in the environment, once."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")  # a trainer's tensors are on the CPU, also where a GPU is
    return (distributed.get_rank(), size) if size > 1 else (0, 1)


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its mean over the ranks, in one all-reduce. A gradient that no rank has stays None."""
    if not distributed.is_initialized():
        return
    parameters = [p for p in parameters if p.requires_grad]
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
    distributed.all_reduce(present)
    chosen = [p for p, count in zip(parameters, present.tolist(), strict=True) if count]
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in chosen]
    flat = torch.cat([g.flatten() for g in grads])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for p, mean in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
        p.grad = mean.view_as(p)


def mean_over_ranks(values: list[float]) -> list[float]:
    """Mean of each number over the ranks that have it (nan: has none)."""
    if not distributed.is_initialized():
        return values
    x = torch.tensor(values, dtype=torch.float64)
    both = torch.stack([x.nan_to_num(0.0), (~x.isnan()).double()])
    distributed.all_reduce(both)
    return (both[0] / both[1]).tolist()


def barrier() -> None:
    """Wait for all ranks."""
    if distributed.is_initialized():
        distributed.barrier()

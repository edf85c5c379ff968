"""Data-parallel training: one process a core or machine, gradients added up once a step.

Start with `torchrun --nproc-per-node N -m uvg_engine.cli train ...`. Each rank takes its part of every batch: a run
with N ranks computes what a single process computes with N times `accumulate`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, distributed


def start() -> tuple[int, int]:
    """(rank, world size); joins the process group that torchrun announces in the environment, once."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")  # a trainer's tensors are on the CPU, also where a GPU is
    return (distributed.get_rank(), size) if size > 1 else (0, 1)


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its sum over the ranks, in one all-reduce. A gradient that no rank has stays None."""
    if not distributed.is_initialized():
        return
    parameters = [p for p in parameters if p.requires_grad]
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
    distributed.all_reduce(present)
    chosen = [p for p, count in zip(parameters, present.tolist(), strict=True) if count]
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in chosen])
    distributed.all_reduce(flat)
    for p, total in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
        p.grad = total.view_as(p)


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Sum of each number over the ranks."""
    if not distributed.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(total)
    return total.tolist()


def require_same(values: Mapping[str, int]) -> None:
    """Wait for all ranks. Raises ValueError, on every rank, where one has another value of a name than the others."""
    if not distributed.is_initialized():
        return
    low = torch.tensor(list(values.values()), dtype=torch.int64)
    high = low.clone()
    distributed.all_reduce(low, distributed.ReduceOp.MIN)
    distributed.all_reduce(high, distributed.ReduceOp.MAX)
    for (name, value), differs in zip(values.items(), (low != high).tolist(), strict=True):
        if differs:
            raise ValueError(f"every rank must have the same {name}, got {value} in rank {distributed.get_rank()}")


def barrier() -> None:
    """Wait for all ranks."""
    if distributed.is_initialized():
        distributed.barrier()

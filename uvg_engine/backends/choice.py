"""In which order the backends are asked on an NVIDIA GPU: by op, compute capability and class of shape.

The choice looks at nothing that a request's neighbours in a batch change: not at rows, samples or spans. Else the same
request would meet another backend, and get other bits, in other company.

Untuned: nothing here was measured by us. The reasons are published figures and what the kernels are made of. The first
backend that does not refuse serves, so a library that is not installed costs nothing but its place. `UVG_BACKENDS` and
`backends.force` go before this table.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from uvg_engine.backends import devices

WIDE = 128  # head width above which the CUDA kernel and cuDNN serve no attention


@dataclass(frozen=True)
class Rule:
    """Who is asked first, where the capability lies in [since, until) and the shape is of that class ("" is any)."""

    op: str
    since: devices.Capability
    until: devices.Capability
    shape: str
    first: tuple[str, ...]
    reason: str


_ANY = (99, 0)
_RULES = (
    Rule(
        *("flash_attention", (8, 0), _ANY, "wide", ("flash_attn_3", "flash_attn", "triton")),
        "FlashAttention has tiles of its own for such heads, ours are Triton's general ones",
    ),
    Rule(
        *("flash_attention", (8, 0), (9, 0), "usual", ("flash_attn", "cuda", "triton")),
        "FlashAttention-2 reaches 73 % of an A100's peak (arXiv 2307.08691); ours is made of the same instructions",
    ),
    Rule(
        *("flash_attention", (9, 0), (10, 0), "usual", ("flash_attn_3", "cudnn", "triton", "flash_attn", "cuda")),
        "FlashAttention-3 reaches 75 % of an H100's peak, cuDNN comes near it, FlashAttention-2 reaches 35 % (arXiv "
        "2407.08608); Triton's kernel has wgmma, the CUDA kernel mma.sync",
    ),
    Rule(
        *("flash_attention", (10, 0), (12, 0), "usual", ("cudnn", "triton", "flash_attn", "cuda")),
        "cuDNN and Triton's kernel have tcgen05, the others mma.sync; FlashAttention-3 is for 9.0 alone",
    ),
    Rule(
        *("flash_attention", (12, 0), _ANY, "usual", ("flash_attn", "cuda", "triton")),
        "these GPUs have neither wgmma nor tcgen05: all are made of mma.sync",
    ),
    Rule(
        *("linear_sample", (9, 0), (12, 0), "", ("triton", "cuda")),
        "Triton's product has wgmma or tcgen05, the CUDA kernel mma.sync",
    ),
)


@dataclass(frozen=True)
class Order:
    """Backends in the order in which they are asked, and why this one."""

    names: tuple[str, ...]
    reason: str


def shape_class(op: str, args: tuple[Any, ...]) -> str:
    """The class of a call's shape: "wide" or "usual" heads for attention, "" for what has no classes."""
    if op != "flash_attention":
        return ""
    return "wide" if args[0].shape[-1] > WIDE else "usual"


def order(op: str, args: tuple[Any, ...], everyone: tuple[str, ...]) -> Order:
    """The order for a call on a GPU; `everyone` that the rule does not name follows as it stands there."""
    if torch.version.hip:
        return Order(everyone, "no table for AMD GPUs: the most specialised first")
    return _order(op, devices.capability(args[0].device), shape_class(op, args), everyone)


@functools.lru_cache(maxsize=256)
def _order(op: str, capability: devices.Capability, shape: str, everyone: tuple[str, ...]) -> Order:
    what = f"{op}{f' of {shape} heads' if shape else ''} on sm_{capability[0]}{capability[1]}"
    for rule in _RULES:
        if rule.op == op and rule.since <= capability < rule.until and rule.shape == shape:
            rest = tuple(name for name in everyone if name not in rule.first)
            return Order(
                (*(name for name in rule.first if name in everyone), *rest), f"{what} (untuned): {rule.reason}"
            )
    return Order(everyone, f"{what}: the most specialised first")

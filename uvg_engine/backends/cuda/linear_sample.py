from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import devices
from uvg_engine.backends.cuda._tensors import aligned, floats_like, launch, refuses_tensors

PANEL = 64  # kPanel of csrc/cuda/linear_sample.cu
MAX_ROWS = devices.MAX_GRID * 64  # tiles of kTile rows along the second axis of a grid
_DTYPES = (torch.bfloat16, torch.float16)


def refuses(x: Tensor, *rest: object) -> str | None:
    if x.dim() == 2 and x.shape[1] % 8:
        return f"width {x.shape[1]}; have multiples of 8"
    if len(x) > MAX_ROWS:
        return f"{len(x)} rows; up to {MAX_ROWS}"
    return refuses_tensors(x, dtypes=_DTYPES)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, seeds: Tensor, steps: Tensor, tokens: Tensor, temperature: float
) -> Tensor:
    """Arguments and results as in reference.linear_sample.forward."""
    ids = torch.empty(len(x), dtype=torch.int64, device=x.device)
    given = {"x": x, "weight": weight, "bias": bias, "seeds": seeds, "steps": steps, "tokens": tokens}
    sizes = {"rows": x.shape[0], "width": x.shape[1], "vocab": len(weight), "dtype": x.dtype}
    launch(
        "linear_sample_forward",
        x,
        **{name: aligned(value) for name, value in given.items()},
        **sizes,
        temperature=temperature,
        ids=ids,
        weighed=floats_like(x, len(x), -(-len(weight) // PANEL), 2),
    )
    return ids

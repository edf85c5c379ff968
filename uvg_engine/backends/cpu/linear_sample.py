from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, at, refuses_tensors


def refuses(x: Tensor, *rest: object) -> str | None:
    return refuses_tensors(x)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, seeds: Tensor, steps: Tensor, tokens: Tensor, temperature: float
) -> Tensor:
    """Arguments and results as in reference.linear_sample.forward."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    names = [name.contiguous() for name in (seeds, steps, tokens)]
    ids = torch.empty(len(x), dtype=torch.int64)
    native.core().linear_sample(
        *(at(x), at(weight), at(bias), [at(name) for name in names]),
        *(*x.shape, len(weight), temperature, DTYPES[x.dtype], torch.get_num_threads(), at(ids)),
    )
    return ids

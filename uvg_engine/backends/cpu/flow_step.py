from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, at, refuses_numbers, refuses_tensors


def refuses(x: Tensor, v_cond: Tensor, v_uncond, guidance: Tensor, coefs: Tensor, *rest) -> str | None:
    numbers = {"guidance": guidance, "coefs": coefs, "jump_prob": rest[6]}
    return refuses_tensors(x) or refuses_numbers(numbers)


def forward(*args: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.flow_step.forward."""
    packed = [None if value is None else value.contiguous() for value in args]
    x, spans, tokens = packed[0], packed[8], packed[9]
    assert x is not None and spans is not None and tokens is not None
    x_next, corrected, estimate, tokens_next = (torch.empty_like(value) for value in (x, x, x, tokens))
    native.core().flow_step(
        *(at(value) for value in packed),
        *(len(x), len(tokens), len(spans), DTYPES[x.dtype], torch.get_num_threads()),
        *([at(x_next), at(corrected), at(estimate)], at(tokens_next)),
    )
    return x_next, corrected, estimate, tokens_next

from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends.cuda._tensors import launch, packed, refuses_numbers, refuses_tensors

_NAMES = (
    *("x", "v_cond", "v_uncond", "guidance", "coefs", "last", "m1", "m2", "latent_spans"),
    *("tokens", "drawn", "jump_prob", "seeds", "steps", "token_spans"),
)


def refuses(x: Tensor, v_cond: Tensor, v_uncond, guidance: Tensor, coefs: Tensor, *rest) -> str | None:
    return refuses_tensors(x) or refuses_numbers({"guidance": guidance, "coefs": coefs, "jump_prob": rest[6]})


def forward(*args: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.flow_step.forward."""
    given = {name: packed(value) for name, value in zip(_NAMES, args, strict=True)}
    x, tokens, spans = given["x"], given["tokens"], given["latent_spans"]
    assert x is not None and tokens is not None and spans is not None
    x_next, corrected, estimate, tokens_next = (torch.empty_like(value) for value in (x, x, x, tokens))
    sizes = {"num_latents": len(x), "num_tokens": len(tokens), "samples": len(spans), "dtype": x.dtype}
    out = {"x_next": x_next, "corrected": corrected, "estimate": estimate, "tokens_next": tokens_next}
    launch("flow_step_forward", x, **given, **sizes, **out)
    return x_next, corrected, estimate, tokens_next

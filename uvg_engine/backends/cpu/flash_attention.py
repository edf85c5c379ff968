from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, at, new_floats, refuses_tensors


def refuses(q: Tensor, *rest: object) -> str | None:
    return refuses_tensors(q)


def _attention(backward: bool, x: list[Tensor], q_spans: Tensor, k_spans: Tensor, scale: float, **out) -> None:
    """Calls the kernel on packed tensors; x and dx are (for q, for k, for v)."""
    spans = [s.contiguous() for s in (q_spans, k_spans)]
    rows = [(at(s), *s.shape[:2], len(y)) for s, y in zip(spans, x, strict=False)]
    native.core().flash_attention(
        *(backward, [at(value) for value in x], *rows, *x[0].shape[1:], scale),
        *(DTYPES[x[0].dtype], torch.get_num_threads()),
        *(at(out.get(name)) for name in ("out", "lse", "dout")),
        [at(value) for value in out.get("dx", (None, None, None))],
    )


def forward(q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.flash_attention.forward."""
    x = [value.contiguous() for value in (q, k, v)]
    out, lse = torch.empty_like(x[0]), new_floats(q.shape[1], q.shape[0])
    _attention(False, x, q_spans, k_spans, scale, out=out, lse=lse)
    return out, lse


def backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.flash_attention.backward."""
    x = [value.contiguous() for value in (q, k, v)]
    dq, dk, dv = (torch.empty_like(value) for value in x)
    given = {"out": out.contiguous(), "lse": lse.contiguous(), "dout": dout.contiguous()}
    _attention(True, x, q_spans, k_spans, scale, dx=(dq, dk, dv), **given)
    return dq, dk, dv

"""The flash_attn_3 backend: FlashAttention-3 (module flash_attn_interface), its varlen calls over packed samples."""

from __future__ import annotations

import functools
import inspect
from types import ModuleType

import torch
from torch import Tensor

from uvg_engine.backends import Kernel, devices, samples
from uvg_engine.backends.samples import Packed


@functools.cache
def _package() -> tuple[ModuleType | None, str | None]:
    """(flash_attn_interface, None) or (None, why not)."""
    return samples.library("flash_attn_interface", "flash-attn 3 (module flash_attn_interface)")


def refuses(q: Tensor, *rest: object) -> str | None:
    """Heads up to 256 wide on a GPU of capability 9.0; the package."""
    if (reason := samples.refuses(q, 256)) is not None:
        return reason
    major, minor = devices.capability(q.device)
    return f"compute capability {major}.{minor}; have 9.0" if (major, minor) != (9, 0) else _package()[1]


@functools.cache
def _asked_for_lse() -> dict[str, bool]:
    """Newer releases give the lse on demand, earlier ones always."""
    library = _package()[0]
    assert library is not None
    wanted = "return_attn_probs"
    return {wanted: True} if wanted in inspect.signature(library.flash_attn_varlen_func).parameters else {}


def _attend(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed, scale: float) -> tuple[Tensor, Tensor]:
    library = _package()[0]
    assert library is not None
    bounds = queries.bounds, keys.bounds, queries.longest, keys.longest
    out, lse, *_ = library.flash_attn_varlen_func(q, k, v, *bounds, softmax_scale=scale, **_asked_for_lse())
    return out, lse


def _attend_back(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Packed,
    keys: Packed,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    library = _package()[0]
    assert library is not None
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    library._flash_attn_backward(
        *(dout, q, k, v, out, lse),
        cu_seqlens_q=queries.bounds,
        cu_seqlens_k=keys.bounds,
        sequed_q=None,  # sic
        sequed_k=None,
        max_seqlen_q=queries.longest,
        max_seqlen_k=keys.longest,
        dq=grads[0],
        dk=grads[1],
        dv=grads[2],
        softmax_scale=scale,
        deterministic=True,
    )
    return grads


TABLE = {
    "flash_attention": Kernel(
        functools.partial(samples.forward, _attend), functools.partial(samples.backward, _attend_back), refuses
    )
}

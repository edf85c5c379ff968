"""The flash_attn backend: FlashAttention-2 (package flash-attn, from 2.7 on), its varlen calls over packed samples."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from uvg_engine.backends import Kernel, samples
from uvg_engine.backends.samples import Packed

_OLDEST = (2, 7)  # whose backward takes these arguments and whose lse is [N, T]


@functools.cache
def _package() -> tuple[ModuleType | None, str | None]:
    """(flash_attn.flash_attn_interface, None) or (None, why not)."""
    package, reason = samples.library("flash_attn", "flash-attn")
    if package is None:
        return None, reason
    if tuple(int(part) for part in package.__version__.split(".")[:2]) < _OLDEST:
        return None, f"flash-attn {package.__version__}; from {_OLDEST[0]}.{_OLDEST[1]} on"
    return samples.library("flash_attn.flash_attn_interface", "flash-attn")


def refuses(q: Tensor, *rest: object) -> str | None:
    """Heads up to 256 wide; the package."""
    return samples.refuses(q, 256) or _package()[1]


def _attend(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed, scale: float) -> tuple[Tensor, Tensor]:
    library = _package()[0]
    assert library is not None
    bounds = queries.bounds, keys.bounds, queries.longest, keys.longest
    out, lse, _ = library.flash_attn_varlen_func(q, k, v, *bounds, softmax_scale=scale, return_attn_probs=True)
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
    """A call for each sample: the library cuts dq's sum by multiprocessors / (samples * heads) of the call, so that a
    sample's bits would depend on how many others there are."""
    library = _package()[0]
    assert library is not None
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    asking, asked = queries.each(dout, q, out, lse.T, grads[0]), keys.each(k, v, *grads[1:])
    for (q_bounds, dout_one, q_one, out_one, lse_one, dq), (k_bounds, k_one, v_one, dk, dv) in zip(
        asking, asked, strict=True
    ):
        library._flash_attn_varlen_backward(
            *(dout_one, q_one, k_one, v_one, out_one, lse_one.T.contiguous(), dq, dk, dv),
            *(q_bounds, k_bounds, len(q_one), len(k_one)),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=False,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=True,
        )
    return grads


TABLE = {
    "flash_attention": Kernel(
        functools.partial(samples.forward, _attend), functools.partial(samples.backward, _attend_back), refuses
    )
}

"""Peers that run on CUDA only, imported when a benchmark on a GPU first asks for them. None was run so far."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.case import Peer, Size, leaf


def on_cuda(device: str) -> str | None:
    """Why a peer that comes with torch is missing."""
    return None if device == "cuda" else "runs on cuda only"


def grouped_mm_missing(device: str) -> str | None:
    """As `on_cuda`, and torch must have it."""
    return on_cuda(device) or (None if hasattr(torch, "_grouped_mm") else f"torch {torch.__version__} has none")


def package_on_cuda(module: str) -> Any:
    """As `on_cuda`, and the package must be installed."""

    def missing(device: str) -> str | None:
        return on_cuda(device) or (None if importlib.util.find_spec(module) else f"{module} is not installed")

    return missing


def flash_attn_peer(dense: Peer) -> Peer:
    """flash-attn on the samples of torch's peer [B, N, L, H], as [B, L, N, H]."""
    from flash_attn import flash_attn_func

    inputs = tuple(leaf(x.transpose(1, 2)) for x in dense.inputs)
    return Peer(flash_attn_func, inputs, lambda out: dense.restore(out.transpose(1, 2)))


def cudnn_peer(dense: Peer) -> Peer:
    """torch's attention, pinned to cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return functional.scaled_dot_product_attention(q, k, v)

    return Peer(attention, dense.inputs, dense.restore)


def flex_peer(dense: Peer, sees: Tensor) -> Peer:
    """FlexAttention, compiled, on the samples of torch's peer [B, N, L, H]; making its mask of blocks is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows = len(sees)
    sees = sees.to(dense.inputs[0].device)
    mask = create_block_mask(lambda b, n, i, j: sees[i, j], None, None, rows, rows, device=str(sees.device))
    compiled = torch.compile(flex_attention, dynamic=False)
    return Peer(lambda q, k, v: compiled(q, k, v, block_mask=mask), dense.inputs, dense.restore)


def grouped_mm_peer(size: Size, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, offsets: Tensor) -> Peer:
    """torch's grouped product, which has no bias: added with the GELU after it."""
    ends = offsets[1:].to(torch.int32)
    expert = torch.repeat_interleave(torch.arange(len(w1), device=x.device), offsets.diff().long())

    def experts(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        hidden = torch._grouped_mm(x, w1.transpose(1, 2), offs=ends) + b1[expert]
        hidden = functional.gelu(hidden, approximate="tanh")
        return torch._grouped_mm(hidden, w2.transpose(1, 2), offs=ends) + b2[expert]

    return Peer(experts, tuple(leaf(value) for value in (x, w1, b1, w2, b2)))


def liger_layer_norm_peer(size: Size, x: Tensor, shift: Tensor, scale: Tensor, spans: Tensor) -> Peer:
    """Liger's layer norm has one weight and one bias a call: a call for the rows of each sample and modality."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    lengths = [size.video] * size.samples + [size.text] * size.samples

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        parts = zip(x.split(lengths), 1 + scale, shift, strict=True)
        return torch.cat([LigerLayerNormFunction.apply(rows, weight, bias, 1e-6) for rows, weight, bias in parts])

    return Peer(norm, (leaf(x), leaf(shift), leaf(scale)))


def liger_rms_norm_peer(size: Size, x: Tensor, weight: Tensor) -> Peer:
    """Liger's RMS norm, which leaves the gradient that it is given as it was."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return Peer(
        lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False), (leaf(x), leaf(weight))
    )


def liger_peer(size: Size, x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Peer:
    """Liger's head and cross-entropy in one; it computes the gradients within its forward."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="none")
    inputs = (leaf(x), leaf(weight), leaf(bias), target)
    return Peer(lambda x, weight, bias, target: fused(weight, x, target, bias), inputs)

"""One small call of every op, as a model makes it: what `uvg doctor` asks the backends about.

Shape letters: T rows, D width, N heads, H head width, V vocabulary, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from uvg_engine import backends, ops

_T, _N, _H, _V, _E, _K = 8, 2, 128, 1024, 2, 2  # head width as in the published models
_D = _N * _H


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of the first call of torch.ops.uvg.<op> inside; calls run as always."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.name, self.args = f"uvg::{op}", None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name() == self.name and self.args is None:
            self.args = args
        return function(*args, **(kwargs or {}))


def ask(op: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Call `op` once: {"served_by": backend or None, "refused": {backend: reason}, "why": text, "error": text or None}.

    served_by heeds UVG_BACKENDS; refused holds the reasons of all that do not serve the call; why is what
    `backends.why` says. Raises ValueError on an op without a call here.
    """
    if op not in CALLS:
        raise ValueError(f"op must be one of {', '.join(CALLS)}, got {op!r}")
    recorder = _Recorder(op)
    error = None
    try:
        with torch.device(device), torch.no_grad(), recorder:
            CALLS[op](dtype)
    except Exception as problem:  # a doctor tells what is broken instead of breaking
        error = f"{type(problem).__name__}: {problem}"
    if recorder.args is None:
        return {"served_by": None, "refused": {}, "why": "", "error": error}
    said = backends.explain(op, *recorder.args)
    served_by = next((name for name in backends.asked(op, recorder.args) if said[name] is None), None)
    refused = {name: reason for name, reason in said.items() if reason is not None}
    return {"served_by": served_by, "refused": refused, "why": backends.why(op, *recorder.args), "error": error}


def _spans(*rows: tuple[int, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def _int64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _flash_attention(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, _T, _N, _H, dtype=dtype)
    ops.flash_attention(q, k, v, _spans((0, _T))[None], _spans((0, _T))[None])


def _flash_attention_int8(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, _T, _N, _H, dtype=dtype)
    ops.flash_attention_int8(q, k, v, _spans((0, _T))[None], _spans((0, _T))[None])


def _flow_noise(dtype: torch.dtype) -> None:
    half = torch.full((1,), 0.5)
    data, tokens, spans = torch.randn(_T, dtype=dtype), torch.zeros(_T, dtype=torch.int64), _spans((0, _T))
    ops.flow_noise(data, tokens, half, half, _int64(0), 0, spans, spans, _V)


def _flow_step(dtype: torch.dtype) -> None:
    x, cond, uncond = torch.randn(3, _T, dtype=dtype)
    coefs = torch.zeros(1, 10)
    coefs[0, 0], coefs[0, 1], coefs[0, 6], coefs[0, 9] = -0.5, 1.0, 1.0, -0.1  # Euler
    tokens, spans = torch.zeros(_T, dtype=torch.int64), _spans((0, _T))
    half, seeds, steps = torch.full((1,), 0.5), _int64(0), _int64(0)
    rest = (coefs, None, None, None, spans, tokens, tokens + 1, half, seeds, steps, spans)
    ops.flow_step(x, cond, uncond, torch.full((1,), 5.0), *rest)


def _gated_residual(dtype: torch.dtype) -> None:
    h, y = torch.randn(2, _T, _D, dtype=dtype)
    ops.gated_residual(h, y, torch.randn(1, _D), _spans((0, _T)))


def _gated_residual_norm(dtype: torch.dtype) -> None:
    h, y = torch.randn(2, _T, _D, dtype=dtype)
    gate, shift, scale = torch.randn(3, 1, _D)
    spans = _spans((0, _T))
    ops.gated_residual_norm(h, y, gate, spans, shift, scale, spans)


def _linear(dtype: torch.dtype) -> None:
    ops.linear(torch.randn(_T, _D, dtype=dtype), torch.randn(2 * _D, _D, dtype=dtype), activation="gelu_tanh")


def _linear_cross_entropy(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(_T, _D, dtype=dtype), torch.randn(_V, _D, dtype=dtype), torch.zeros(_V, dtype=dtype)
    ops.linear_cross_entropy(x, weight, bias, torch.zeros(_T, dtype=torch.int64))


def _linear_int8(dtype: torch.dtype) -> None:
    ops.linear_int8(torch.randn(_T, _D, dtype=dtype), torch.randn(2 * _D, _D, dtype=dtype), activation="gelu_tanh")


def _linear_sample(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(_T, _D, dtype=dtype), torch.randn(_V, _D, dtype=dtype), torch.zeros(_V, dtype=dtype)
    ops.linear_sample(x, weight, bias, *torch.zeros(3, _T, dtype=torch.int64))


def _modulated_layer_norm(dtype: torch.dtype) -> None:
    shift, scale = torch.randn(2, 1, _D)
    ops.modulated_layer_norm(torch.randn(_T, _D, dtype=dtype), shift, scale, _spans((0, _T)))


def _moe_combine(dtype: torch.dtype) -> None:
    order = torch.arange(_T * _K, dtype=torch.int32)
    ops.moe_combine(torch.randn(_T * _K, _D, dtype=dtype), order, torch.rand(_T, _K))


def _moe_dispatch(dtype: torch.dtype) -> None:
    ops.moe_dispatch(torch.randn(_T, _D, dtype=dtype), torch.zeros(_T, _K, dtype=torch.int32), _E)


def _experts(dtype: torch.dtype) -> tuple[Tensor, ...]:
    w1, w2 = torch.randn(_E, 2 * _D, _D, dtype=dtype), torch.randn(_E, _D, 2 * _D, dtype=dtype)
    b1, b2 = torch.zeros(_E, 2 * _D, dtype=dtype), torch.zeros(_E, _D, dtype=dtype)
    offsets = torch.tensor([0, _T // 2, _T], dtype=torch.int32)
    return torch.randn(_T, _D, dtype=dtype), w1, b1, w2, b2, offsets


def _moe_mlp(dtype: torch.dtype) -> None:
    ops.moe_mlp(*_experts(dtype))


def _moe_mlp_int8(dtype: torch.dtype) -> None:
    ops.moe_mlp_int8(*_experts(dtype))


def _moe_route(dtype: torch.dtype) -> None:
    ops.moe_route(torch.randn(_T, _E, dtype=dtype), 1)


def _qk_norm_rope(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, _T, _D, dtype=dtype)
    weight = torch.ones(_D, dtype=dtype)
    ops.qk_norm_rope(q, k, weight, weight, _spans((0, _T, 1, 0, 0, 0)), torch.randn(2, _T, _H // 2, 2), _N)


def _window_attention(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, _T, _N, _H, dtype=dtype)
    ops.window_attention(q, k, v, _spans((0, 1, 2, 3)), _spans((6, _T - 6)))


CALLS: dict[str, Callable[[torch.dtype], None]] = {
    "flash_attention": _flash_attention,
    "flash_attention_int8": _flash_attention_int8,
    "flow_noise": _flow_noise,
    "flow_step": _flow_step,
    "gated_residual": _gated_residual,
    "gated_residual_norm": _gated_residual_norm,
    "linear": _linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_int8": _linear_int8,
    "linear_sample": _linear_sample,
    "modulated_layer_norm": _modulated_layer_norm,
    "moe_combine": _moe_combine,
    "moe_dispatch": _moe_dispatch,
    "moe_mlp": _moe_mlp,
    "moe_mlp_int8": _moe_mlp_int8,
    "moe_route": _moe_route,
    "qk_norm_rope": _qk_norm_rope,
    "window_attention": _window_attention,
}

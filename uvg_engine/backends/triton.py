"""The triton backend: kernels/<op>.py on CUDA and ROCm devices. Triton is imported at the first call it serves.

Under Triton's interpreter (TRITON_INTERPRET=1 before triton is imported) it serves CPU tensors too, thousands of times
slower: for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uvg_engine.backends import Kernel, devices

OLDEST = [3, 6]  # Triton, major and minor: what torch 2.11 brings
MAX_WIDTH = 8192  # of a row that a program holds in registers
MAX_HEAD = 128  # twice that spilled on sm_90 in every backward tried
MAX_EXPERTS = 4096  # whose counts or logits a program holds in registers
FAR = 2**31  # what an int32 does not count: addresses are int64, but numbers of rows are not
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def interpreting() -> bool:
    """Whether Triton runs kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _missing() -> str | None:
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    version = importlib.import_module("triton").__version__
    old = [int(number) for number in re.findall(r"\d+", version)[:2]] < OLDEST
    return f"triton {version}; from {OLDEST[0]}.{OLDEST[1]} on" if old else None


def refuses(*tensors: Tensor) -> str | None:
    """Rules of every op: device, dtype, Triton itself."""
    for x in tensors:
        if not x.is_cuda and not (interpreting() and x.is_cpu):
            return f"tensors are on {x.device.type}"
        if x.dtype not in _DTYPES:
            return f"dtype {x.dtype}; have float32, bfloat16, float16"
    if _missing():
        return _missing()
    return None if torch.version.hip or tensors[0].is_cpu else devices.too_old(tensors[0].device)


def refuses_rows(x: Tensor, *more: Tensor) -> str | None:
    """Rules of the ops that hold a whole row of x in a program."""
    if x.shape[1] > MAX_WIDTH:
        return f"width {x.shape[1]}; up to {MAX_WIDTH}"
    return refuses(x, *more)


def refuses_attention(q: Tensor, *rest: Any) -> str | None:
    """Heads of a width for which there are tiles. Rules of flash_attention and window_attention."""
    scale = rest[-1]
    if q.shape[2] > MAX_HEAD:
        return f"head width {q.shape[2]}; up to {MAX_HEAD}"
    if q.shape[1] > devices.MAX_GRID:
        return f"{q.shape[1]} heads; up to {devices.MAX_GRID}"
    if scale <= 0:
        return f"scale {scale}; above 0: the largest score is found before scaling"
    return refuses(q)


def refuses_rope(q: Tensor, k: Tensor | None, wq: Tensor, wk: Any, spans: Any, table: Tensor | None, *rest: Any):
    """Rows, and a table that is read as it is."""
    if table is not None and table.dtype != torch.float32:
        return f"rope_table of {table.dtype}; have float32"
    if table is not None and table.numel() >= FAR:
        return f"rope_table of {table.numel()} numbers; below {FAR}"
    return refuses_rows(q)


def refuses_flow_noise(data: Tensor, tokens: Tensor, sigma: Tensor, kappa: Tensor, *rest: Any) -> str | None:
    """Any length; numbers of the samples in fp32."""
    return refuses_numbers(sigma=sigma, kappa=kappa) or refuses(data)


def refuses_flow_step(
    x: Tensor, v_cond: Tensor, v_uncond: Any, guidance: Tensor, coefs: Tensor, *rest: Any
) -> str | None:
    """As `refuses_flow_noise`."""
    return refuses_numbers(guidance=guidance, coefs=coefs, jump_prob=rest[6]) or refuses(x)


def refuses_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, current: Any, rate: Tensor | None, loss: str
) -> str | None:
    """Any sizes; rates are read as fp32."""
    return (refuses_numbers(rate=rate) if rate is not None else None) or refuses(x)


def refuses_numbers(**values: Tensor) -> str | None:
    """Numbers of a sample are read as fp32."""
    for name, value in values.items():
        if value.dtype != torch.float32:
            return f"{name} of {value.dtype}; have float32"
    return None


def refuses_dispatch(x: Tensor, experts: Tensor, num_experts: int) -> str | None:
    """Rows, and counts of the experts in registers."""
    if num_experts > MAX_EXPERTS:
        return f"{num_experts} experts; up to {MAX_EXPERTS}"
    return refuses_rows(x)


def refuses_mlp(x: Tensor, w1: Tensor, *rest: Any) -> str | None:
    """The offsets of the experts in registers; rows of the weights of all of them counted by an int32."""
    if len(w1) > MAX_EXPERTS:
        return f"{len(w1)} experts; up to {MAX_EXPERTS}"
    rows = len(w1) * max(w1.shape[1:])
    if rows >= FAR:
        return f"{rows} rows of weights; below {FAR}"
    return refuses(x)


def refuses_route(logits: Tensor, top_k: int) -> str | None:
    """Logits of a row in registers."""
    if logits.shape[1] > MAX_EXPERTS:
        return f"{logits.shape[1]} experts; up to {MAX_EXPERTS}"
    return refuses(logits)


def _host(op: str, function: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"uvg_engine.kernels.{op}"), function)(*args)

    return call


def _kernel(op: str, rule: Callable[..., str | None], backward: bool = True) -> tuple[str, Kernel]:
    return op, Kernel(_host(op, "forward"), _host(op, "backward") if backward else None, rule)


TABLE = dict(
    [
        _kernel("flash_attention", refuses_attention),
        _kernel("flow_noise", refuses_flow_noise, backward=False),
        _kernel("flow_step", refuses_flow_step, backward=False),
        _kernel("gated_residual", lambda h, y, *rest: refuses_rows(h, y)),
        _kernel("gated_residual_norm", lambda h, y, *rest: refuses_rows(h, y)),
        _kernel("linear_cross_entropy", refuses_cross_entropy),
        _kernel("linear_sample", lambda x, *rest: refuses(x), backward=False),
        _kernel("modulated_layer_norm", lambda x, *rest: refuses_rows(x)),
        _kernel("moe_combine", lambda rows, *rest: refuses_rows(rows)),
        _kernel("moe_dispatch", refuses_dispatch),
        _kernel("moe_mlp", refuses_mlp),
        _kernel("moe_route", refuses_route),
        _kernel("qk_norm_rope", refuses_rope),
        _kernel("window_attention", refuses_attention),
    ]
)

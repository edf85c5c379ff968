"""The cpu backend: C++ kernels of the native core. Here tensors are checked and made ready; kernels see addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import Kernel, native
from uvg_engine.reference.moe_mlp import expert_rows

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def _refuses(*tensors: Tensor) -> str | None:
    """CPU tensors in fp32 or bf16, and a native core to run them."""
    if native.cpu() is None:
        return native.why_not()
    for x in tensors:
        if x.device.type != "cpu":
            return f"tensors are on {x.device.type}"
        if x.dtype not in _DTYPES:
            return f"dtype {x.dtype}; have float32, bfloat16"
    return None


def _at(x: Tensor | None) -> int:
    """Address of a packed tensor, 0 for none. The caller keeps it alive."""
    return 0 if x is None else x.data_ptr()


def _floats(x: Tensor | None) -> Tensor | None:
    """A parameter as kernels read it: packed fp32."""
    return None if x is None else x.float().contiguous()


def _new(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32)


def _norm_args(backward: bool, x: Tensor, shift, scale, spans, weight, bias, eps: float, **out: Tensor) -> tuple:
    names = ("mean", "rstd", "y", "dy", "dx", "dshift", "dscale", "dweight", "dbias")
    return (
        backward,
        *(_at(value) for value in (x, shift, scale, spans, weight, bias)),
        *(*x.shape, 0 if spans is None else len(spans), eps, _DTYPES[x.dtype], torch.get_num_threads()),
        *(_at(out.get(name)) for name in names),
    )


def norm_forward(x: Tensor, shift, scale, spans, weight, bias, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.modulated_layer_norm.forward."""
    x = x.contiguous()
    spans = None if spans is None else spans.contiguous()
    shift, scale, weight, bias = (_floats(value) for value in (shift, scale, weight, bias))
    y = torch.empty_like(x)
    mean, rstd = _new(len(x)), _new(len(x))
    native.core().modulated_layer_norm(
        *_norm_args(False, x, shift, scale, spans, weight, bias, eps, y=y, mean=mean, rstd=rstd)
    )
    return y, mean, rstd


def norm_backward(
    dy: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, shift, scale, spans, weight, bias, eps: float
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.modulated_layer_norm.backward."""
    x, dy = x.contiguous(), dy.contiguous()
    spans = None if spans is None else spans.contiguous()
    given = (shift, scale, weight, bias)
    f_shift, f_scale, f_weight, f_bias = (_floats(value) for value in given)
    grads = [_new(0) if value is None else _new(*value.shape) for value in given]
    dx = torch.empty_like(x)
    names = dict(zip(("dshift", "dscale", "dweight", "dbias"), grads, strict=True))
    kept = {name: grad for (name, grad), value in zip(names.items(), given, strict=True) if value is not None}
    native.core().modulated_layer_norm(
        *_norm_args(True, x, f_shift, f_scale, spans, f_weight, f_bias, eps, dy=dy, mean=mean, rstd=rstd, dx=dx, **kept)
    )
    typed = (g if value is None else g.to(value.dtype) for g, value in zip(grads, given, strict=True))
    return dx, *typed


def _refuses_residual(h: Tensor, y: Tensor, *rest: object) -> str | None:
    return _refuses(h, y)


def _residual(backward: bool, h, y: Tensor, gate, spans, dtype_h: torch.dtype, **out: Tensor) -> None:
    """Calls the kernel; every tensor must be packed."""
    native.core().gated_residual(
        backward,
        *(_at(value) for value in (h, y, gate, spans)),
        *(*y.shape, 0 if spans is None else len(spans), _DTYPES[dtype_h], _DTYPES[y.dtype]),
        torch.get_num_threads(),
        *(_at(out.get(name)) for name in ("out", "dout", "dy", "dgate")),
    )


def residual_forward(h: Tensor, y: Tensor, gate: Tensor | None, spans: Tensor | None) -> Tensor:
    """Arguments and results as in reference.gated_residual.forward."""
    h, y, gate = h.contiguous(), y.contiguous(), _floats(gate)
    spans = None if spans is None else spans.contiguous()
    out = torch.empty_like(h)
    _residual(False, h, y, gate, spans, h.dtype, out=out)
    return out


def residual_backward(
    dout: Tensor, h: Tensor, y: Tensor, gate: Tensor | None, spans: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.gated_residual.backward."""
    dout, y, floats = dout.contiguous(), y.contiguous(), _floats(gate)
    spans = None if spans is None else spans.contiguous()
    dy = torch.empty_like(y)
    if gate is None:
        _residual(True, None, y, None, None, dout.dtype, dout=dout, dy=dy)
        return dy, _new(0)
    dgate = _new(*gate.shape)
    _residual(True, None, y, floats, spans, dout.dtype, dout=dout, dy=dy, dgate=dgate)
    return dy, dgate.to(gate.dtype)


def _refuses_rope(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, spans: Tensor, table: Tensor, *rest) -> str | None:
    if table.dtype != torch.float32:
        return f"rope_table of {table.dtype}; have float32"
    return _refuses(q, k)


def _rope(backward: bool, x: list, weight: list, spans: Tensor, table: Tensor, heads: int, eps: float, **out) -> None:
    """Calls the kernel; x, weight and each entry of out are pairs (for q, for k)."""
    spans, table = spans.contiguous(), table.contiguous()
    packed = [_floats(w) for w in weight]
    native.core().qk_norm_rope(
        backward,
        [_at(value) for value in x],
        [_at(value) for value in packed],
        *(_at(spans), _at(table), *x[0].shape, heads, len(spans), table.shape[1], eps),
        *(_DTYPES[x[0].dtype], torch.get_num_threads()),
        *([_at(value) for value in out.get(name, (None, None))] for name in ("rstd", "y", "dy", "dx", "dweight")),
    )


def rope_forward(q, k, weight_q, weight_k, rope_spans, rope_table, num_heads: int, eps: float) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.qk_norm_rope.forward."""
    x = [q.contiguous(), k.contiguous()]
    y, rstd = [torch.empty_like(value) for value in x], [_new(len(q)), _new(len(q))]
    _rope(False, x, [weight_q, weight_k], rope_spans, rope_table, num_heads, eps, y=y, rstd=rstd)
    return *y, *rstd


def rope_backward(
    dq, dk, rstd_q, rstd_k, q, k, weight_q, weight_k, rope_spans, rope_table, num_heads: int, eps: float
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.qk_norm_rope.backward."""
    x, dy = [q.contiguous(), k.contiguous()], [dq.contiguous(), dk.contiguous()]
    weight = [weight_q, weight_k]
    dx, dweight = [torch.empty_like(value) for value in x], [_new(*value.shape) for value in weight]
    out = {"rstd": [rstd_q, rstd_k], "dy": dy, "dx": dx, "dweight": dweight}
    _rope(True, x, weight, rope_spans, rope_table, num_heads, eps, **out)
    return *dx, *(grad.to(value.dtype) for grad, value in zip(dweight, weight, strict=True))


def _refuses_mlp(x: Tensor, w1: Tensor, *rest) -> str | None:
    return _refuses(x)


def _activate(backward: bool, pre: Tensor, hidden: Tensor, dhidden: Tensor | None = None) -> None:
    """Calls the kernel on packed tensors; the gradient of `pre` takes the place of `dhidden`."""
    native.core().moe_mlp(
        backward,
        *(_at(pre), pre.numel(), _DTYPES[pre.dtype], torch.get_num_threads()),
        *(_at(hidden), _at(dhidden), _at(dhidden)),
    )


def mlp_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group_offsets: Tensor):
    """Arguments and results as in reference.moe_mlp.forward; products are oneDNN's, written where they belong."""
    y, pre = x.new_empty(len(x), w2.shape[1]), x.new_empty(len(x), w1.shape[1])
    for e, rows in expert_rows(group_offsets):
        torch.addmm(b1[e], x[rows], w1[e].T, out=pre[rows])
        hidden = torch.empty_like(pre[rows])
        _activate(False, pre[rows], hidden)
        torch.addmm(b2[e], hidden, w2[e].T, out=y[rows])
    return y, pre


def mlp_backward(
    dy: Tensor, pre: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group_offsets: Tensor
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.moe_mlp.backward."""
    dy, dx = dy.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    dw1, db1, dw2, db2 = (torch.zeros_like(p, memory_format=torch.contiguous_format) for p in (w1, b1, w2, b2))
    for e, rows in expert_rows(group_offsets):
        dpre, hidden = dy[rows] @ w2[e], torch.empty_like(pre[rows])
        _activate(True, pre[rows], hidden, dpre)
        torch.mm(dy[rows].T, hidden, out=dw2[e])
        torch.mm(dpre.T, x[rows], out=dw1[e])
        torch.mm(dpre, w1[e], out=dx[rows])
        db2[e] = dy[rows].sum(0, dtype=torch.float32)
        db1[e] = dpre.sum(0, dtype=torch.float32)
    return dx, dw1, db1, dw2, db2


def _attention(backward: bool, x: list[Tensor], q_spans: Tensor, k_spans: Tensor, scale: float, **out) -> None:
    """Calls the kernel on packed tensors; x and dx are (for q, for k, for v)."""
    spans = [s.contiguous() for s in (q_spans, k_spans)]
    rows = [(_at(s), *s.shape[:2], len(y)) for s, y in zip(spans, x, strict=False)]
    native.core().flash_attention(
        *(backward, [_at(value) for value in x], *rows, *x[0].shape[1:], scale),
        *(_DTYPES[x[0].dtype], torch.get_num_threads()),
        *(_at(out.get(name)) for name in ("out", "lse", "dout")),
        [_at(value) for value in out.get("dx", (None, None, None))],
    )


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.flash_attention.forward."""
    x = [value.contiguous() for value in (q, k, v)]
    out, lse = torch.empty_like(x[0]), _new(q.shape[1], q.shape[0])
    _attention(False, x, q_spans, k_spans, scale, out=out, lse=lse)
    return out, lse


def attention_backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.flash_attention.backward."""
    x = [value.contiguous() for value in (q, k, v)]
    dq, dk, dv = (torch.empty_like(value) for value in x)
    given = {"out": out.contiguous(), "lse": lse.contiguous(), "dout": dout.contiguous()}
    _attention(True, x, q_spans, k_spans, scale, dx=(dq, dk, dv), **given)
    return dq, dk, dv


TABLE = {
    "modulated_layer_norm": Kernel(norm_forward, norm_backward, lambda x, *rest: _refuses(x)),
    "gated_residual": Kernel(residual_forward, residual_backward, _refuses_residual),
    "qk_norm_rope": Kernel(rope_forward, rope_backward, _refuses_rope),
    "flash_attention": Kernel(attention_forward, attention_backward, lambda q, *rest: _refuses(q)),
    "moe_mlp": Kernel(mlp_forward, mlp_backward, _refuses_mlp),
}

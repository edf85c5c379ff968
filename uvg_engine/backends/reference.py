"""The reference backend: plain PyTorch, every op, every dtype, every device. It refuses nothing."""

from __future__ import annotations

from uvg_engine.backends import Kernel
from uvg_engine.backends.autocast import left_out
from uvg_engine.reference import (
    flash_attention,
    flash_attention_int8,
    flow_noise,
    flow_step,
    gated_residual,
    gated_residual_norm,
    linear,
    linear_cross_entropy,
    linear_int8,
    linear_sample,
    modulated_layer_norm,
    moe_combine,
    moe_dispatch,
    moe_mlp,
    moe_mlp_int8,
    moe_route,
    qk_norm_rope,
    window_attention,
)

_KERNELS = {
    "flash_attention": Kernel(flash_attention.forward, flash_attention.backward),
    "flash_attention_int8": Kernel(flash_attention_int8.forward),
    "flow_noise": Kernel(flow_noise.forward),
    "flow_step": Kernel(flow_step.forward),
    "gated_residual": Kernel(gated_residual.forward, gated_residual.backward),
    "gated_residual_norm": Kernel(gated_residual_norm.forward, gated_residual_norm.backward),
    "linear": Kernel(linear.forward, linear.backward),
    "linear_cross_entropy": Kernel(linear_cross_entropy.forward, linear_cross_entropy.backward),
    "linear_int8": Kernel(linear_int8.forward),
    "linear_sample": Kernel(linear_sample.forward),
    "modulated_layer_norm": Kernel(modulated_layer_norm.forward, modulated_layer_norm.backward),
    "moe_combine": Kernel(moe_combine.forward, moe_combine.backward),
    "moe_dispatch": Kernel(moe_dispatch.forward, moe_dispatch.backward),
    "moe_mlp": Kernel(moe_mlp.forward, moe_mlp.backward),
    "moe_mlp_int8": Kernel(moe_mlp_int8.forward),
    "moe_route": Kernel(moe_route.forward, moe_route.backward),
    "qk_norm_rope": Kernel(qk_norm_rope.forward, qk_norm_rope.backward),
    "window_attention": Kernel(window_attention.forward, window_attention.backward),
}
TABLE = {op: left_out(kernel) for op, kernel in _KERNELS.items()}

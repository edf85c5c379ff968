"""The cpu backend: C++ kernels of the native core, a module for each op. There tensors are checked and made ready;
kernels see addresses."""

from __future__ import annotations

from uvg_engine.backends import Kernel
from uvg_engine.backends.cpu import (
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
)

TABLE = {
    "flash_attention": Kernel(flash_attention.forward, flash_attention.backward, flash_attention.refuses),
    "flash_attention_int8": Kernel(flash_attention_int8.forward, refuses=flash_attention_int8.refuses),
    "flow_noise": Kernel(flow_noise.forward, refuses=flow_noise.refuses),
    "flow_step": Kernel(flow_step.forward, refuses=flow_step.refuses),
    "gated_residual": Kernel(gated_residual.forward, gated_residual.backward, gated_residual.refuses),
    "gated_residual_norm": Kernel(
        gated_residual_norm.forward, gated_residual_norm.backward, gated_residual_norm.refuses
    ),
    "linear": Kernel(linear.forward, linear.backward, linear.refuses),
    "linear_cross_entropy": Kernel(
        linear_cross_entropy.forward, linear_cross_entropy.backward, linear_cross_entropy.refuses
    ),
    "linear_int8": Kernel(linear_int8.forward, refuses=linear_int8.refuses),
    "linear_sample": Kernel(linear_sample.forward, refuses=linear_sample.refuses),
    "modulated_layer_norm": Kernel(
        modulated_layer_norm.forward, modulated_layer_norm.backward, modulated_layer_norm.refuses
    ),
    "moe_combine": Kernel(moe_combine.forward, moe_combine.backward, moe_combine.refuses),
    "moe_dispatch": Kernel(moe_dispatch.forward, moe_dispatch.backward, moe_dispatch.refuses),
    "moe_mlp": Kernel(moe_mlp.forward, moe_mlp.backward, moe_mlp.refuses),
    "moe_mlp_int8": Kernel(moe_mlp_int8.forward, refuses=moe_mlp_int8.refuses),
    "moe_route": Kernel(moe_route.forward, moe_route.backward, moe_route.refuses),
    "qk_norm_rope": Kernel(qk_norm_rope.forward, qk_norm_rope.backward, qk_norm_rope.refuses),
}

"""The cuda backend: kernels in CUDA C++ for NVIDIA GPUs, a module for each op. There tensors are checked and made
ready; kernels see addresses. Tests run the same tables on CPU tensors by the simulator of csrc/sim."""

from __future__ import annotations

from uvg_engine.backends import Kernel
from uvg_engine.backends.cuda import (
    flash_attention,
    flow_noise,
    flow_step,
    gated_residual,
    gated_residual_norm,
    linear_sample,
    modulated_layer_norm,
    moe_combine,
    moe_dispatch,
    moe_route,
    qk_norm_rope,
)

TABLE = {
    "flash_attention": Kernel(flash_attention.forward, flash_attention.backward, flash_attention.refuses),
    "flow_noise": Kernel(flow_noise.forward, refuses=flow_noise.refuses),
    "flow_step": Kernel(flow_step.forward, refuses=flow_step.refuses),
    "gated_residual": Kernel(gated_residual.forward, gated_residual.backward, gated_residual.refuses),
    "gated_residual_norm": Kernel(
        gated_residual_norm.forward, gated_residual_norm.backward, gated_residual_norm.refuses
    ),
    "linear_sample": Kernel(linear_sample.forward, refuses=linear_sample.refuses),
    "modulated_layer_norm": Kernel(
        modulated_layer_norm.forward, modulated_layer_norm.backward, modulated_layer_norm.refuses
    ),
    "moe_combine": Kernel(moe_combine.forward, moe_combine.backward, moe_combine.refuses),
    "moe_dispatch": Kernel(moe_dispatch.forward, moe_dispatch.backward, moe_dispatch.refuses),
    "moe_route": Kernel(moe_route.forward, moe_route.backward, moe_route.refuses),
    "qk_norm_rope": Kernel(qk_norm_rope.forward, qk_norm_rope.backward, qk_norm_rope.refuses),
}

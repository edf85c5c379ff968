"""The cpu backend: C++ kernels of the native core, a module for each op. There tensors are checked and made ready;
kernels see addresses."""

from __future__ import annotations

from uvg_engine.backends import Kernel
from uvg_engine.backends.cpu import (
    flash_attention,
    gated_residual,
    linear_sample,
    modulated_layer_norm,
    moe_mlp,
    qk_norm_rope,
)

TABLE = {
    "flash_attention": Kernel(flash_attention.forward, flash_attention.backward, flash_attention.refuses),
    "gated_residual": Kernel(gated_residual.forward, gated_residual.backward, gated_residual.refuses),
    "linear_sample": Kernel(linear_sample.forward, refuses=linear_sample.refuses),
    "modulated_layer_norm": Kernel(
        modulated_layer_norm.forward, modulated_layer_norm.backward, modulated_layer_norm.refuses
    ),
    "moe_mlp": Kernel(moe_mlp.forward, moe_mlp.backward, moe_mlp.refuses),
    "qk_norm_rope": Kernel(qk_norm_rope.forward, qk_norm_rope.backward, qk_norm_rope.refuses),
}

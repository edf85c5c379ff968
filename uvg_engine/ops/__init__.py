"""The ops, usable alone inside another model. One file each: public function, schema, fake, autograd."""

from uvg_engine.ops._registry import require
from uvg_engine.ops.flash_attention import flash_attention
from uvg_engine.ops.flash_attention_int8 import flash_attention_int8
from uvg_engine.ops.flow_noise import flow_noise, flow_source
from uvg_engine.ops.flow_step import flow_step, jump_coins
from uvg_engine.ops.gated_residual import gated_residual
from uvg_engine.ops.gated_residual_norm import gated_residual_norm
from uvg_engine.ops.linear import linear
from uvg_engine.ops.linear_cross_entropy import linear_cross_entropy
from uvg_engine.ops.linear_int8 import linear_int8
from uvg_engine.ops.linear_sample import linear_sample
from uvg_engine.ops.modulated_layer_norm import modulated_layer_norm
from uvg_engine.ops.moe_combine import moe_combine
from uvg_engine.ops.moe_dispatch import moe_dispatch
from uvg_engine.ops.moe_mlp import moe_mlp
from uvg_engine.ops.moe_mlp_int8 import moe_mlp_int8
from uvg_engine.ops.moe_route import moe_route
from uvg_engine.ops.qk_norm_rope import qk_norm_rope
from uvg_engine.ops.window_attention import window_attention

__all__ = [
    "flash_attention",
    "flash_attention_int8",
    "flow_noise",
    "flow_source",
    "flow_step",
    "gated_residual",
    "gated_residual_norm",
    "jump_coins",
    "linear",
    "linear_cross_entropy",
    "linear_int8",
    "linear_sample",
    "modulated_layer_norm",
    "moe_combine",
    "moe_dispatch",
    "moe_mlp",
    "moe_mlp_int8",
    "moe_route",
    "qk_norm_rope",
    "require",
    "window_attention",
]

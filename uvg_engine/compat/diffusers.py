"""diffusers' Wan transformer on our ops: the same module, weights and names, with faster blocks.

    from uvg_engine.compat.diffusers import accelerate

    pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16)
    accelerate(pipe.transformer)

Letters: B samples, L rows of a sample, C condition rows, D width, N heads, H head width, T = B * L.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from uvg_engine import ops
from uvg_engine.backends import packed_weights
from uvg_engine.compat.flash_attn import flash_attn_func
from uvg_engine.reference.qk_norm_rope import VIDEO

try:
    from diffusers import WanTransformer3DModel
    from diffusers.models.activations import GELU
    from diffusers.models.attention import FeedForward
    from diffusers.models.normalization import FP32LayerNorm
    from diffusers.models.transformers.transformer_wan import (
        WanAttention,
        WanAttnProcessor,
        WanRotaryPosEmbed,
        WanTransformerBlock,
    )
except ModuleNotFoundError as error:
    if error.name != "diffusers":
        raise
    raise ModuleNotFoundError("uvg_engine.compat.diffusers needs diffusers: pip install 'uvg-engine[wan]'") from error

__all__ = ["accelerate", "restore"]

Model = TypeVar("Model", bound=WanTransformer3DModel)
_TEXT_ROWS = 512  # of a condition that begins with an image's rows, as diffusers has it


def accelerate(transformer: Model) -> Model:
    """Let the blocks of a WanTransformer3DModel compute with `uvg_engine.ops`, forward and backward; returns it.

    Weights, names, configuration and what `save_pretrained` writes stay as they are, and so does the result within
    rounding. A projection that is not a plain nn.Linear (LoRA, quantised, hooked), or whose product autocast would
    round, is called as it is. Raises ValueError on another model, on dropout, rotations or blocks of its own, on those
    that offloading or a cache has hooked (turn these on afterwards), and, when it is called, on attention processors, a
    model's attention backend, fused projections, and on attentions, norms, activations, dropouts or ffn with hooks or
    with something in their place (adapters of norms): those would be ignored. Not for offloading leaf by leaf, which
    hooks every layer, nor for caches that hook attentions; FirstBlockCache and MagCache hook blocks.
    """
    model = _of_wan(transformer)
    for block in model.blocks:
        known = type(block) in (WanTransformerBlock, _Block)
        _require(known, "transformer.blocks must be WanTransformerBlocks", _name(block))
        for part in (block.attn1.to_out, block.attn2.to_out, block.ffn.net):
            _require_no_dropout(part[1])
    if type(model.rope) is not _Rope:
        _require_own("transformer.rope", model.rope, (WanRotaryPosEmbed,))
    _turn(model, {WanRotaryPosEmbed: _Rope, WanTransformerBlock: _Block})
    return transformer


def restore(transformer: Model) -> Model:
    """Undo `accelerate`, and forget the packed weights; returns the transformer. Raises ValueError on another model,
    and on blocks that offloading or a cache has hooked since."""
    model = _of_wan(transformer)
    _turn(model, {_Rope: WanRotaryPosEmbed, _Block: WanTransformerBlock})
    for weight in model.blocks.parameters():
        if type(weight) is nn.Parameter:  # others need not have memory
            packed_weights.forget(weight)
    return transformer


def _of_wan(model: Any) -> Any:
    _require(type(model) is WanTransformer3DModel, "transformer must be a WanTransformer3DModel", _name(model))
    return model


def _turn(transformer: Any, kinds: dict[type, type]) -> None:
    parts = {"rope": transformer.rope} | {f"blocks.{i}": block for i, block in enumerate(transformer.blocks)}
    turning = {name: part for name, part in parts.items() if type(part) in kinds}
    for name, part in turning.items():
        if not _calls_its_class(part):  # a hook holds on to the forward that it found
            _require(False, f"transformer.{name} must have its own forward", _name(part.forward))
    for part in turning.values():
        vars(part).pop("forward", None)
        part.__class__ = kinds[type(part)]


@dataclass(frozen=True)
class _Rows:
    """What the blocks have to know of the rows; diffusers hands it on as it does its own rotations.

    spans: int32 [B, 2]. group_offsets: int32 [2]. rope_spans: int32 [B, 6]. table: fp32 [2, P, H/2, 2].
    """

    spans: Tensor
    group_offsets: Tensor
    rope_spans: Tensor
    table: Tensor


_PARTS: dict[str, tuple[type, ...]] = {  # of a block, that are not called or of which not all is
    "attn1": (WanAttention,),
    "attn2": (WanAttention,),
    "norm1": (FP32LayerNorm,),
    "norm2": (FP32LayerNorm, nn.Identity),
    "norm3": (FP32LayerNorm,),
    "ffn": (FeedForward,),
}


class _Rope(WanRotaryPosEmbed):
    freqs_cos: Tensor
    freqs_sin: Tensor

    def forward(self, hidden_states: Tensor) -> Any:
        """hidden_states: latents [B, channels, frames, height, width]."""
        samples, _, *sizes = hidden_states.shape
        grid = [size // patch for size, patch in zip(sizes, self.patch_size, strict=True)]
        rows, device, cos, sin = math.prod(grid), hidden_states.device, self.freqs_cos, self.freqs_sin
        _require(max(grid) <= len(cos), f"latents must have at most {len(cos)} patches along an axis", grid)
        start = torch.arange(samples, dtype=torch.int32, device=device) * rows
        columns = [start, *(torch.full_like(start, value) for value in (rows, VIDEO, *grid))]
        rope_spans = torch.stack(columns, 1)
        angles = torch.stack([cos[:, 0::2], sin[:, 1::2]], -1).float()  # each stands twice there
        group_offsets = torch.arange(2, dtype=torch.int32, device=device) * (samples * rows)
        return _Rows(rope_spans[:, :2].contiguous(), group_offsets, rope_spans, torch.stack([angles, angles]))


class _Block(WanTransformerBlock):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
        """hidden_states [B, L, D], encoder_hidden_states [B, C, D], temb [B, 6, D] or, for every row, [B, L, 6, D]."""
        _require(type(rotary_emb) is _Rows, "rotary_emb must be what the accelerated rope gives", _name(rotary_emb))
        rows: _Rows = rotary_emb
        for name, kinds in _PARTS.items():
            _require_own(name, getattr(self, name), kinds)
        samples, length = hidden_states.shape[:2]
        h, spans = hidden_states.flatten(0, 1), rows.spans
        modulation = self.scale_shift_table + temb.float()
        if temb.ndim == 4:
            modulation, spans = modulation.flatten(0, 1), _one_by_one(len(h), h.device)
        shift, scale, gate, last_shift, last_scale, last_gate = modulation.unbind(1)

        a = ops.modulated_layer_norm(h, shift, scale, spans, eps=self.norm1.eps)
        y = _attend(self.attn1, a.unflatten(0, (samples, length)), None, rows)
        norm: Any = self.norm2
        if isinstance(norm, nn.Identity):
            h = n = ops.gated_residual(h, y, gate, spans)
        else:
            h, n = ops.gated_residual_norm(h, y, gate, spans, weight=norm.weight, bias=norm.bias, eps=norm.eps)
        y = _attend(self.attn2, n.unflatten(0, (samples, length)), encoder_hidden_states, None)
        h, f = ops.gated_residual_norm(h, y, None, None, last_shift, last_scale, spans, eps=self.norm3.eps)
        return ops.gated_residual(h, self._expert(f, rows), last_gate, spans).unflatten(0, (samples, length))

    def _expert(self, f: Tensor, rows: _Rows) -> Tensor:
        """[T, D] -> [T, D]."""
        ffn: Any = self.ffn
        _require_own("ffn.net[0]", ffn.net[0], (GELU,))
        _require_no_dropout(ffn.net[1])
        first, last = ffn.net[0].proj, ffn.net[2]
        if not (_plain(first, f) and _plain(last, f)):
            return ffn(f)
        w1, b1, w2, b2 = (each.unsqueeze(0) for each in (first.weight, first.bias, last.weight, last.bias))
        return ops.moe_mlp(f, w1, b1, w2, b2, rows.group_offsets)


_Block.__name__ = WanTransformerBlock.__name__  # by it diffusers finds what to compile, others what not to split
with contextlib.suppress(ImportError, AttributeError):  # an older diffusers has no caches that ask for a block's class
    from diffusers.hooks import _helpers

    # not by `register`, which imports every model of diffusers
    _helpers.TransformerBlockRegistry._registry[_Block] = _helpers.TransformerBlockMetadata(0, _cls=_Block)


def _attend(attn: Any, x: Tensor, condition: Tensor | None, rows: _Rows | None) -> Tensor:
    """One attention with its projections and norms. x [B, L, D], condition [B, C, D] -> [T, D]. rows: to rotate by."""
    _require_as_made(attn)
    source, image = x if condition is None else condition, None
    if attn.add_k_proj is not None:
        before = source.shape[1] - _TEXT_ROWS
        image, source = source[:, :before], source[:, before:]
    q, k, v = _project(attn.to_q, x), _project(attn.to_k, source), _project(attn.to_v, source)
    if rows is None:
        q, k = _normed(q, attn.norm_q), _normed(k, attn.norm_k)
    else:
        rotation, eps = (rows.rope_spans, rows.table, attn.heads), attn.norm_q.eps
        q, k = ops.qk_norm_rope(q, k, attn.norm_q.weight, attn.norm_k.weight, *rotation, eps=eps)

    heads = q.view(*x.shape[:2], attn.heads, -1)

    def seen(k: Tensor, v: Tensor) -> Tensor:
        k, v = (each.view(len(x), -1, *heads.shape[2:]) for each in (k, v))
        y: Any = flash_attn_func(heads, k, v)
        return y.view(q.shape)

    y = seen(k, v)
    if image is not None:
        k = _normed(_project(attn.add_k_proj, image), attn.norm_added_k)
        y = y + seen(k, _project(attn.add_v_proj, image))
    return _project(attn.to_out[0], y)


def _project(layer: Any, x: Tensor) -> Tensor:
    """[..., D] -> [rows, F]."""
    x = x.flatten(0, -2)
    return ops.linear(x, layer.weight, layer.bias) if _plain(layer, x) else layer(x)


def _normed(x: Tensor, norm: Any) -> Tensor:
    return ops.qk_norm_rope(x, None, norm.weight, None, eps=norm.eps)[0]


def _plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether a call of the layer on x is its product, in the dtype that both have, and nothing else."""
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or _hooked(layer):
        return False
    return layer.weight.dtype == x.dtype == _multiplied_in(x)


def _multiplied_in(x: Tensor) -> torch.dtype:
    """The dtype to which torch would round x for a product: under autocast that of autocast."""
    device = x.device.type
    follows = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if follows else x.dtype


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or not _calls_its_class(module)


def _calls_its_class(module: nn.Module) -> bool:
    """Whether a call runs the forward of the module's class, which a hook that was removed leaves with the module."""
    if "forward" not in module.__dict__:
        return True
    forward: Any = module.__dict__["forward"]
    return getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module


def _require_as_made(attn: Any) -> None:
    processor = attn.processor
    own = type(processor) is WanAttnProcessor
    own = own and processor._attention_backend is None and processor._parallel_config is None
    _require(own, "an attention must have diffusers' processor, without a backend of its own", _name(processor))
    for name in ("norm_q", "norm_k") if attn.add_k_proj is None else ("norm_q", "norm_k", "norm_added_k"):
        _require_own(name, getattr(attn, name), (nn.RMSNorm,))
    _require_no_dropout(attn.to_out[1])
    fused = getattr(attn, "fused_projections", False)
    _require(not fused, "projections must not be fused", fused)


def _require_own(name: str, module: nn.Module, kinds: tuple[type, ...]) -> None:
    """It is what diffusers put there, and a call of it would do nothing else."""
    if type(module) not in kinds:
        _require(False, f"{name} must be {' or '.join(kind.__name__ for kind in kinds)}", _name(module))
    if _hooked(module):
        _require(False, f"{name} must have no hooks and its own forward", _name(module))


def _require_no_dropout(module: Any) -> None:
    _require_own("dropout", module, (nn.Dropout,))
    _require(module.p == 0, "dropout must be 0", module.p)


def _one_by_one(rows: int, device: torch.device) -> Tensor:
    start = torch.arange(rows, dtype=torch.int32, device=device)
    return torch.stack([start, torch.ones_like(start)], 1)


def _name(module: object) -> str:
    return type(module).__name__


def _require(ok: bool, rule: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{rule}, got {value}")

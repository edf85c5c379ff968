"""Uni-ViGU: video and text tokens in one diffusion transformer, on the packed layout.

Letters: B samples, T rows, D width, C latent channels, L text length, V vocabulary, N latent values, U condition rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uvg_engine.model.blocks import Asking, Block, BlockCondition, Reading, Rows, Weight
from uvg_engine.model.config import UniViGUConfig
from uvg_engine.model.embeddings import ConditionEmbedder, TextRope, TimeEmbedding
from uvg_engine.model.layout import Grid, Layout, Selection, tiles
from uvg_engine.model.linear import affine, linear
from uvg_engine.model.patches import patch_grid, patchify, unpatchify
from uvg_engine.ops import modulated_layer_norm, require

ConditionKV = list[BlockCondition]
TimeTable = tuple[Tensor, Tensor]  # of one modality: temb [B, D], modulation [B, 6, D]; fp32
_LOWEST_SIGMA = 0.05  # of what a predicted sample's error is divided by, as in arXiv 2511.13720


@dataclass(frozen=True)
class PackedOutput:
    """velocity: flat [N] like the latents. text_hidden: [L total, D], what the vocabulary head multiplies."""

    velocity: Tensor | None
    text_hidden: Tensor | None


class TextHead(nn.Module):
    """LN with a weight only, modulation, Linear to V logits."""

    def __init__(self, config: UniViGUConfig) -> None:
        super().__init__()
        self.norm_final = Weight(config.dim)
        self.linear = nn.Linear(config.dim, config.vocab)


class VideoHead(nn.Module):
    """LN, modulation, Linear to a patch."""

    def __init__(self, config: UniViGUConfig) -> None:
        super().__init__()
        self.proj_out = nn.Linear(config.dim, config.in_channels * config.patch_volume)


class UniViGU(nn.Module):
    """The model. State-dict keys are those of the published checkpoint.

    compute_dtype: dtype of the matrix products (None: that of the weights); statistics, modulation and the residual
    stream are fp32. Where `int8` is set to True, the blocks multiply rows with their weights, and queries with keys, in
    bytes (`ops.linear_int8`, `moe_mlp_int8`, `flash_attention_int8`): for sampling on the CPU, without gradients. Build
    under `torch.device("meta")` to allocate nothing. Source: arXiv 2604.08121 on Wan2.1 (arXiv 2503.20314).
    """

    def __init__(self, config: UniViGUConfig, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.int8 = False
        dim, patch = config.dim, config.patch
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=patch, stride=patch)
        self.vocab_embed = nn.Embedding(config.vocab, dim)
        self.time_embedding_v, self.time_embedding_t = TimeEmbedding(config), TimeEmbedding(config)
        self.cond_text_embedder = ConditionEmbedder(config.text_dim, dim)
        self.rotary_emb_text = TextRope(config.head_dim)
        blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.blocks: Sequence[Block] = blocks  # type: ignore[assignment]
        self.scale_shift_table_v = nn.Parameter(torch.empty(1, 2, dim))
        self.scale_shift_table_t = nn.Parameter(torch.empty(1, 2, dim))
        self.video_head, self.text_head = VideoHead(config), TextHead(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all for training from nothing (after `to_empty` too): Linears Xavier, both heads zero, as Wan."""
        tables = [block.scale_shift_table for block in self.blocks]
        for table in (*tables, self.scale_shift_table_v, self.scale_shift_table_t):
            nn.init.normal_(table, std=self.config.dim**-0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Weight | nn.LayerNorm):
                nn.init.ones_(module.weight)
        for block in self.blocks:
            nn.init.zeros_(block.norm2.bias)
            for weight in (*block.experts.w1, *block.experts.w2):
                nn.init.xavier_uniform_(weight)
            for bias in (block.experts.b1, block.experts.b2):
                nn.init.zeros_(bias)
        patch_weight, patch_bias = self._patch_linear()
        nn.init.xavier_uniform_(patch_weight)
        nn.init.zeros_(patch_bias)
        nn.init.normal_(self.vocab_embed.weight, std=0.02)
        for embedding in (self.time_embedding_v, self.time_embedding_t):
            nn.init.normal_(embedding.time_embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedding.time_embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(self.text_head.linear.weight)
        nn.init.zeros_(self.video_head.proj_out.weight)
        self.rotary_emb_text.reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products."""
        return self.compute_dtype or self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.patch_embedding.weight.device

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """`uvg_engine.model.save_pretrained`."""
        from uvg_engine.model.checkpoint import save_pretrained  # it imports this file

        save_pretrained(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> UniViGU:
        """`uvg_engine.model.from_pretrained`."""
        from uvg_engine.model.checkpoint import from_pretrained  # it imports this file

        return from_pretrained(folder, dtype, compute_dtype, device)

    def condition_kv(self, cond: Tensor, cond_lens: Sequence[int], *, isolate: bool = False) -> ConditionKV:
        """Keys and values of every block's cross-attention: once per request, for all steps.

        cond: [U, text_dim], the samples' rows one after the other; cond_lens: rows per sample.
        """
        spans = torch.tensor(tiles(cond_lens), dtype=torch.int32).view(-1, 2) if isolate else None
        embedded = self.cond_text_embedder(cond, self.dtype, spans)
        return [block.condition_kv(embedded, self.dtype, spans) for block in self.blocks]

    def condition_constant(self, condition: ConditionKV) -> ConditionKV:
        """Of a condition whose rows are all equal: no keys, and what every block's cross-attention adds [1, D]."""
        pairs = zip(self.blocks, condition, strict=True)
        return [BlockCondition(c.k[:0], c.v[:0], block.constant(c.v[:1], self.dtype)) for block, c in pairs]

    def time_tables(self, time_v: Tensor, time_t: Tensor) -> tuple[TimeTable, TimeTable]:
        """What `packed` makes of its times [B], each alone: rows of these may be given to it in their place."""
        return (
            self.time_embedding_v(time_v, self.dtype, True),
            self.time_embedding_t(time_t, self.dtype, True),
        )

    def packed(
        self,
        latents: Tensor,
        tokens: Tensor,
        layout: Layout,
        time_v: Tensor,
        time_t: Tensor,
        condition: ConditionKV,
        *,
        isolate: bool = False,
        time_tables: tuple[TimeTable, TimeTable] | None = None,
        asking: Asking | None = None,
        branches: Selection | None = None,
        reading: Reading | None = None,
    ) -> PackedOutput:
        """One forward over a batch of samples of any sizes and jobs.

        latents: fp32 [N], every sample's [C, F, Y, X] latent flattened, one after the other. tokens: int64 [L total].
        time_v, time_t: [B], model units (0 to 1000). condition: from `condition_kv`. isolate: a sample's bits do
        not depend on its neighbours (on in sampling; costs time only where the backend's products need it).
        time_tables: of time_v and time_t, where they were computed before. asking: which rows attend to a condition.
        branches: samples that go on from those of `layout` after the first self-attention; condition, asking and the
        result are then theirs. reading: the modalities of these samples whose results are read (None: all).
        Returns PackedOutput of the samples, in order; a part that nobody reads, or that no sample has, is None.
        """
        dtype, config = self.dtype, self.config
        spans = layout.row_spans_on_cpu if isolate else None
        if time_tables is None:
            time_tables = self.time_embedding_v(time_v, dtype, isolate), self.time_embedding_t(time_t, dtype, isolate)
        (temb_v, modulation_v), (temb_t, modulation_t) = time_tables
        rows = Rows(
            layout,
            self._rope_table(layout),
            torch.cat([modulation_v, modulation_t]),
            dtype,
            spans,
            asking if branches is None else None,
            self.int8,
        )
        patches = patchify(latents, layout, config)
        video = affine(*self._patch_linear(), patches, dtype, _video(spans))
        h = torch.cat([video.float(), self.vocab_embed(tokens).float()])
        a = self.blocks[0].norm(h, rows)
        next_blocks = (*self.blocks[1:], None)
        for index, (block, following, of_block) in enumerate(zip(self.blocks, next_blocks, condition, strict=True)):
            read = reading if following is None else None
            if index == 0 or read is None:
                h, n = block.mix(h, a, rows)
            if index == 0 and branches is not None:
                rows = rows.select(branches, asking)
                h, n = h.index_select(0, branches.rows), n.index_select(0, branches.rows)
            if read is not None:
                read_rows, place = rows.select(read.selection, read.asking), read.selection.rows
                if index == 0:
                    h, n = h.index_select(0, place), n.index_select(0, place)
                else:
                    h, n = block.mix(h, a, rows, read_rows, place)
                rows = read_rows
            h, a = block.ask_condition(h, n, rows, of_block, following)
        if branches is not None:
            samples = branches.samples
            temb_v, temb_t, time_v = (x.index_select(0, samples) for x in (temb_v, temb_t, time_v))
        velocity = text_hidden = None
        if rows.layout.num_video:
            velocity = self._video_velocity(h[: rows.layout.num_video], rows, temb_v)
            if config.prediction == "sample":
                kept = range(layout.num_samples) if branches is None else branches.kept
                velocity = _velocity(
                    _latents_of(latents, layout, rows.layout, kept, config), velocity, rows.layout, time_v, config
                )
        if rows.layout.num_text:
            text_hidden = self._text_hidden(h[rows.layout.num_video :], rows, temb_t)
        return PackedOutput(velocity, text_hidden)

    def _video_velocity(self, h: Tensor, rows: Rows, temb: Tensor) -> Tensor:
        """The video head: flat [N]."""
        layout = rows.layout
        shift, scale = (self.scale_shift_table_v.float() + temb[:, None]).unbind(1)
        normed = modulated_layer_norm(h, shift, scale, layout.row_spans[: layout.num_samples])
        patches = linear(self.video_head.proj_out, normed, rows.dtype, _video(rows.spans))
        return unpatchify(patches.float(), layout, self.config)

    def _text_hidden(self, h: Tensor, rows: Rows, temb: Tensor) -> Tensor:
        """What the vocabulary head multiplies."""
        shift, scale = (self.scale_shift_table_t.float() + temb[:, None]).unbind(1)
        weight = self.text_head.norm_final.weight
        text = modulated_layer_norm(h, shift, scale, rows.layout.text_spans, weight=weight, eps=1e-5)
        return text.to(rows.dtype)

    def forward(
        self,
        x_v: Tensor,
        x_t: Tensor,
        time_v: Tensor,
        time_t: Tensor,
        cond: Tensor,
        text_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The dense call, for people and tests: every sample of the batch has the same sizes.

        x_v: [B, C, F, Y, X] latents. x_t: int64 [B, L]. time_v, time_t: [B], model units. cond: [B, Lc, text_dim]
        ([1, ...] serves all). text_mask: bool [B, L], False where a token must not be attended to. Returns (velocity
        [B, C, F, Y, X], logits [B, L, V]). Raises ValueError on shapes that do not fit.
        """
        batch, grid, length = self._check_dense(x_v, x_t, time_v, time_t, cond, text_mask)
        layout = Layout.build(
            [grid] * batch,
            [length] * batch,
            [cond.shape[1]] * batch,
            text_masks=None if text_mask is None else list(text_mask.cpu()),
            device=x_v.device,
        )
        condition = self.condition_kv(cond.expand(batch, -1, -1).flatten(0, 1), layout.cond_lens)
        out = self.packed(x_v.flatten(), x_t.flatten(), layout, time_v, time_t, condition)
        assert out.velocity is not None
        if out.text_hidden is None:
            logits = x_v.new_empty(batch, 0, self.config.vocab)
        else:
            logits = self.text_logits(out.text_hidden).view(batch, length, -1)
        return out.velocity.view(x_v.shape), logits

    def text_logits(self, text_hidden: Tensor) -> Tensor:
        """All logits of all rows: [rows, D] -> fp32 [rows, V]. Samplers and losses use the fused ops instead."""
        return linear(self.text_head.linear, text_hidden, self.dtype).float()

    def _check_dense(
        self, x_v: Tensor, x_t: Tensor, time_v: Tensor, time_t: Tensor, cond: Tensor, text_mask: Tensor | None
    ) -> tuple[int, Grid, int]:
        config = self.config
        require(
            x_v.dim() == 5 and x_v.shape[1] == config.in_channels and x_v.numel() > 0,
            f"x_v must be (B, {config.in_channels}, F, Y, X), none of them 0",
            tuple(x_v.shape),
        )
        batch = x_v.shape[0]
        require(x_t.dim() == 2 and x_t.shape[0] == batch, f"x_t must be ({batch}, L)", tuple(x_t.shape))
        for name, time in (("time_v", time_v), ("time_t", time_t)):
            require(time.shape == (batch,), f"{name} must be ({batch},)", tuple(time.shape))
        ok = cond.dim() == 3 and cond.shape[0] in (1, batch) and cond.shape[2] == config.text_dim
        require(ok, f"cond must be ({batch}, Lc, {config.text_dim})", tuple(cond.shape))
        require(
            text_mask is None or text_mask.shape == x_t.shape,
            f"text_mask must be {tuple(x_t.shape)} like x_t",
            None if text_mask is None else tuple(text_mask.shape),
        )
        return batch, patch_grid((x_v.shape[2], x_v.shape[3], x_v.shape[4]), config), x_t.shape[1]

    def _patch_linear(self) -> tuple[Tensor, Tensor]:
        """(weight [D, C * patch], bias [D]) of the patch embedding as a Linear; views."""
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        assert bias is not None
        return weight.flatten(1), bias

    def _rope_table(self, layout: Layout) -> Tensor:
        return self.rotary_emb_text.table(max((*layout.text_lens, *(max(grid) for grid in layout.grids), 1)))


def _video(spans: Tensor | None) -> Tensor | None:
    """The spans of the video rows among those of both modalities."""
    return None if spans is None else spans[: len(spans) // 2]


def _latents_of(latents: Tensor, layout: Layout, read: Layout, samples: Sequence[int], config: UniViGUConfig) -> Tensor:
    """Of the latents of `layout` those of the samples whose video is read, sample k of `read` being samples[k]."""
    if read is layout:
        return latents
    pieces = latents.split(_values(layout, config))
    return torch.cat([pieces[i][:n] for i, n in zip(samples, _values(read, config), strict=True)])


def _values(layout: Layout, config: UniViGUConfig) -> list[int]:
    """Latent values of each sample."""
    return [math.prod(grid) * config.patch_volume * config.in_channels for grid in layout.grids]


def _velocity(latents: Tensor, sample: Tensor, layout: Layout, time_v: Tensor, config: UniViGUConfig) -> Tensor:
    """(x - x0) / sigma from a prediction x0 of the clean latents; all flat [N]."""
    sigma = (time_v / 1000).clamp_min(_LOWEST_SIGMA).float()
    per_value = [one.expand(n) for one, n in zip(sigma, _values(layout, config), strict=True)]
    return (latents - sample) / torch.cat(per_value)

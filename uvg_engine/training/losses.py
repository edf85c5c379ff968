"""The loss of a packed batch: lambda_v * mean video error + lambda_t * mean token loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uvg_engine.model.blocks import Reading
from uvg_engine.model.layout import Selection
from uvg_engine.model.univigu import UniViGU
from uvg_engine.ops import linear_cross_entropy
from uvg_engine.training.batch import Batch
from uvg_engine.training.config import Stage


@dataclass(frozen=True)
class Losses:
    """total has a gradient; video and text are the two means, for the log (nan where the batch has none)."""

    total: Tensor
    video: Tensor
    text: Tensor


def compute_losses(model: UniViGU, batch: Batch, stage: Stage, loss: str = "ce") -> Losses:
    """Forward of both streams and the two means.

    DESIGN's lambda_t = video tokens / text tokens on *sums* makes the two means weigh the same; lambda_t here is the
    factor on top of that (1: as published).
    """
    layout = batch.layout
    condition = model.condition_kv(batch.cond, layout.cond_lens)
    want_text = layout.num_text > 0 and stage.text != "none"
    reading = None
    if layout.num_text and not want_text:
        reading = Reading(Selection.of_read(layout, [True] * layout.num_samples, [False] * layout.num_samples))
    out = model.packed(batch.latents, batch.tokens, layout, batch.time_v, batch.time_t, condition, reading=reading)
    nan = torch.tensor(float("nan"), dtype=torch.float32)
    total, video, text = batch.latents.new_zeros(()), nan, nan
    count = batch.video_weight.sum()
    if out.velocity is not None and count > 0:
        error = (out.velocity - batch.velocity).square() * batch.video_weight
        video = error.sum() / count
        total = total + stage.lambda_v * video
    if out.text_hidden is not None and batch.text_weight.sum() > 0:
        rows = torch.nonzero(batch.text_weight).flatten()
        head = model.text_head.linear
        extra = {} if loss == "ce" else {"current": batch.tokens[rows], "rate": batch.rate[rows]}
        per_token = linear_cross_entropy(
            out.text_hidden[rows],
            head.weight.to(model.dtype),
            head.bias.to(model.dtype),
            batch.targets[rows],
            loss=loss,
            **extra,
        )
        text = per_token.mean()
        total = total + stage.lambda_t * text
    return Losses(total, video.detach(), text.detach())

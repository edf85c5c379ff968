"""The loss of an optimiser step: lambda_v * mean video error + lambda_t * mean token loss.

The means are those of all samples of the step, whatever number of parts (micro-batches, ranks) it is computed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uvg_engine.model.univigu import UniViGU
from uvg_engine.ops import linear_cross_entropy
from uvg_engine.training.batch import Batch
from uvg_engine.training.config import Stage


@dataclass(frozen=True)
class Losses:
    """total has a gradient; video and text are the two means, for the log (nan where nothing counts).

    Of a part of a step each is its share: added up over the parts they are those of the step.
    """

    total: Tensor
    video: Tensor
    text: Tensor


def noisy_counts(batch: Batch) -> list[float]:
    """How many latent values and how many tokens count in the two means."""
    return [float(batch.video_weight.sum(dtype=torch.float64)), float(batch.text_weight.sum(dtype=torch.float64))]


def compute_losses(
    model: UniViGU, batch: Batch, stage: Stage, loss: str = "ce", counts: Sequence[float] | None = None
) -> Losses:
    """Forward of both streams and the two means.

    counts: `noisy_counts` of the whole step that the batch is a part of; None: it is the whole. DESIGN's lambda_t =
    video tokens / text tokens on *sums* makes the two means weigh the same; lambda_t here is the factor on top of that
    (1: as published).
    """
    own_video, own_text = noisy_counts(batch)
    all_video, all_text = counts or (own_video, own_text)
    layout = batch.layout
    condition = model.condition_kv(batch.cond, layout.cond_lens)
    out = model.packed(batch.latents, batch.tokens, layout, batch.time_v, batch.time_t, condition)
    total = batch.latents.new_zeros(())
    video, text = (torch.tensor(0.0 if count else float("nan"), dtype=torch.float32) for count in (all_video, all_text))
    if own_video:
        assert out.velocity is not None
        error = (out.velocity - batch.velocity).square() * batch.video_weight
        video = error.sum() / all_video
        total = total + stage.lambda_v * video
    if own_text:
        assert out.text_hidden is not None
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
        text = per_token.sum() / all_text
        total = total + stage.lambda_t * text
    return Losses(total, video.detach(), text.detach())

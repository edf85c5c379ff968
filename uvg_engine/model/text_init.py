"""How the text parts start when there is only a video model."""

from __future__ import annotations

import torch
from torch import nn

from uvg_engine.model.univigu import UniViGU


@torch.no_grad()
def text_from_video(model: UniViGU) -> UniViGU:
    """Copy the video parts to the text parts, in place: expert, time embedding, head table. Head 0, embedding normal.

    With text absent the model's velocity is unchanged. Source: Uni-ViGU's initialisation from Wan2.1.
    """
    for block in model.blocks:
        for stacked in (block.experts.w1, block.experts.b1, block.experts.w2, block.experts.b2):
            stacked[1] = stacked[0]
    model.time_embedding_t.load_state_dict(model.time_embedding_v.state_dict())
    model.scale_shift_table_t.copy_(model.scale_shift_table_v)
    nn.init.normal_(model.vocab_embed.weight, std=0.02)
    nn.init.ones_(model.text_head.norm_final.weight)
    nn.init.zeros_(model.text_head.linear.weight)
    nn.init.zeros_(model.text_head.linear.bias)
    return model

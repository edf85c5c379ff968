"""Exact savings: the same result for less work, each with an off switch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Savings:
    """Which savings are on. Off changes no result: bitwise, but to rounding for drop_padding, constant_condition and,
    where attention is a library's, skip_unread.

    lazy_head: the jump coins are tossed first; the text head is evaluated only where they say jump.
    skip_idle: a step in which no token of a caption jumps leaves its state as it is: no forward at all. Over N steps a
        token jumps about ln N times, so that many steps cost little more than few.
    condition_cache: keys and values of the condition once per request, not once per step.
    constant_condition: where all rows of a condition are equal (captions, and an unconditional branch without text),
        cross-attention is one vector per block: no queries, no scores. The softmax's weights sum to 1 only to rounding.
    share_first_attention: both branches of guidance are one sample until the first condition: embeddings and the first
        block's self-attention once for both.
    time_tables: time embeddings and modulations of all steps of a job at its start, each time once.
    skip_unguided: no unconditional branch where guidance is 1 or the video does not move.
    skip_unread: of rows whose result nobody reads (the video of captions, clean prompts, text of unconditional branches
        and of steps without a jump) the last block computes keys and values alone, and no head.
    replay: on the CPU, forwards of a small model that come again are replayed from a recording: kernels without Python.
    drop_padding: pads of a clean prompt are not computed. Off, they are masked keys, and matrix products get more rows.
    """

    lazy_head: bool = True
    skip_idle: bool = True
    condition_cache: bool = True
    constant_condition: bool = True
    share_first_attention: bool = True
    time_tables: bool = True
    skip_unguided: bool = True
    skip_unread: bool = True
    replay: bool = True
    drop_padding: bool = True

    @classmethod
    def none(cls) -> Savings:
        """All work done, as a plain implementation would."""
        return cls(**{field.name: False for field in dataclasses.fields(cls)})

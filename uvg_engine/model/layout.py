"""The packed layout: all tokens of a batch in one matrix, modality-major. Built once per batch.

Rows: every sample's video tokens, then every sample's text tokens. Span m*B + b is sample b's run of modality m.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uvg_engine.backends.devices import put

VIDEO, TEXT = 0, 1
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """Where each sample's tokens lie. Make one with `Layout.build`; span tables are int32.

    grids: patch grid (F, Y, X) per sample, (0, 0, 0) without video. text_lens: text tokens per sample. cond_lens:
    condition rows per sample. row_spans [2B, 2]: (start, len). rope_spans [2B, 6]: (start, len, kind, F, Y, X).
    query_spans [B, 2, 2] and key_spans [B, M, 2]: self-attention. cond_spans [B, 1, 2]: rows of the packed condition.
    group_offsets [3]: experts.
    """

    grids: tuple[Grid, ...]
    text_lens: tuple[int, ...]
    cond_lens: tuple[int, ...]
    row_spans: Tensor
    rope_spans: Tensor
    query_spans: Tensor
    key_spans: Tensor
    cond_spans: Tensor
    group_offsets: Tensor

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.grids)

    @property
    def num_video(self) -> int:
        """Video rows of the batch."""
        return sum(f * y * x for f, y, x in self.grids)

    @property
    def num_text(self) -> int:
        """Text rows of the batch."""
        return sum(self.text_lens)

    @property
    def num_rows(self) -> int:
        """T."""
        return self.num_video + self.num_text

    @functools.cached_property
    def row_spans_on_cpu(self) -> Tensor:
        """`row_spans` on the CPU, made of the sizes: a look at a device's would wait for all it was asked before."""
        if self.row_spans.is_cpu:
            return self.row_spans
        rows = tiles([f * y * x for f, y, x in self.grids]) + tiles(self.text_lens, self.num_video)
        return torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(-1, 2)

    @property
    def text_spans(self) -> Tensor:
        """int32 [B, 2] spans of the text rows, counted from the first text row."""
        spans = self.row_spans[self.num_samples :].clone()
        spans[:, 0] -= self.num_video
        return spans

    @classmethod
    def build(
        cls,
        grids: Sequence[Grid],
        text_lens: Sequence[int],
        cond_lens: Sequence[int],
        *,
        text_masks: Sequence[Tensor | None] | None = None,
        device: torch.device | str = "cpu",
    ) -> Layout:
        """Lay out B samples. text_masks: bool [text_len] per sample; False hides the token as a key (it still asks).

        Raises ValueError when the lists differ in length, a size is negative, or a mask has another length.
        """
        count = len(grids)
        if len(text_lens) != count or len(cond_lens) != count or (text_masks is not None and len(text_masks) != count):
            counts = [len(each) for each in (grids, text_lens, cond_lens, text_masks) if each is not None]
            raise ValueError(f"grids, text_lens, cond_lens and text_masks must have one entry a sample, got {counts}")
        if any(min(g) < 0 or len(g) != 3 for g in grids) or any(n < 0 for n in (*text_lens, *cond_lens)):
            raise ValueError(f"sizes must not be negative, got {list(grids)}, {list(text_lens)}, {list(cond_lens)}")
        video_lens = [f * y * x for f, y, x in grids]
        video = tiles(video_lens)
        text = tiles(text_lens, sum(video_lens))
        rope = [(*s, VIDEO, *g) for s, g in zip(video, grids, strict=True)] + [(*s, TEXT, 0, 0, 0) for s in text]
        masks = text_masks if text_masks is not None else [None] * count
        keys = [[v, *_visible(t, m)] for v, t, m in zip(video, text, masks, strict=True)]
        most = max((len(k) for k in keys), default=1)
        keys = [k + [(0, 0)] * (most - len(k)) for k in keys]

        def table(rows: list, *shape: int) -> Tensor:
            return put(torch.tensor(rows, dtype=torch.int32, device="cpu"), torch.device(device)).reshape(*shape)

        return cls(
            grids=tuple((f, y, x) for f, y, x in grids),
            text_lens=tuple(text_lens),
            cond_lens=tuple(cond_lens),
            row_spans=table(video + text, 2 * count, 2),
            rope_spans=table(rope, 2 * count, 6),
            query_spans=table([[v, t] for v, t in zip(video, text, strict=True)], count, 2, 2),
            key_spans=table(keys, count, most, 2),
            cond_spans=table(tiles(cond_lens), count, 1, 2),
            group_offsets=table([0, sum(video_lens), sum(video_lens) + sum(text_lens)], 3),
        )


@dataclass(frozen=True)
class Selection:
    """Samples of another layout, as often as they are wanted and without the modalities that nobody reads.

    layout: sample k is sample samples[k] of the other one; a modality that is left out has no rows, (0, 0, 0) or 0.
    kept: those, on the host; samples: int64 [B], the same. spans: int64 [2B], rows: int64 [T]; where each span and row
    of `layout` comes from.
    """

    layout: Layout
    kept: tuple[int, ...]
    samples: Tensor
    spans: Tensor
    rows: Tensor

    @classmethod
    def build(cls, source: Layout, layout: Layout, samples: Sequence[int]) -> Selection:
        """Raises ValueError where a modality is neither empty nor as long as in the sample that it comes from."""
        for index, grid, length in zip(samples, layout.grids, layout.text_lens, strict=True):
            fits = grid in (source.grids[index], (0, 0, 0)) and length in (source.text_lens[index], 0)
            if not fits:
                size = (source.grids[index], source.text_lens[index])
                raise ValueError(
                    f"samples must have the sizes of those that they go on from, {size}, got {grid, length}"
                )
        spans, runs = [*samples, *(source.num_samples + i for i in samples)], source.row_spans_on_cpu.tolist()
        lens = layout.row_spans_on_cpu[:, 1].tolist()
        rows = torch.cat([torch.arange(runs[i][0], runs[i][0] + n) for i, n in zip(spans, lens, strict=True)])
        device = source.row_spans.device
        numbers = [torch.tensor(each, dtype=torch.int64) for each in (samples, spans)]
        return cls(layout, tuple(samples), *(put(each, device) for each in (*numbers, rows)))

    @classmethod
    def of_read(cls, source: Layout, video: Sequence[bool], text: Sequence[bool]) -> Selection:
        """Every sample once, with the modalities that are read."""
        layout = Layout.build(
            [grid if reads else (0, 0, 0) for grid, reads in zip(source.grids, video, strict=True)],
            [length if reads else 0 for length, reads in zip(source.text_lens, text, strict=True)],
            source.cond_lens,
            device=source.row_spans.device,
        )
        return cls.build(source, layout, range(source.num_samples))


def tiles(lens: Sequence[int], first: int = 0) -> list[tuple[int, int]]:
    """Spans that lie one after the other: (start, len) for each length."""
    spans = []
    for length in lens:
        spans.append((first, length))
        first += length
    return spans


def _visible(span: tuple[int, int], mask: Tensor | None) -> list[tuple[int, int]]:
    """The runs of True of a mask, as spans."""
    start, length = span
    if mask is None:
        return [span]
    if mask.dtype != torch.bool or mask.shape != (length,):
        raise ValueError(f"text mask must be bool ({length},), got {mask.dtype} {tuple(mask.shape)}")
    runs: list[tuple[int, int]] = []
    for index in torch.nonzero(mask).flatten().tolist():
        if runs and sum(runs[-1]) == start + index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((start + index, 1))
    return runs

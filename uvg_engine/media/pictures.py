"""Pictures for people: contact sheets of a video, and the denoising of a video and its text, step by step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from uvg_engine.files import replacing

_GAP = 4
_FONT = 15
_TEXT_WIDTH = 380
_LABEL_WIDTH = 72
_WHITE, _INK = 255, (20, 20, 20)


def contact_sheet(frames_FHWc: torch.Tensor, *, scale: int = 1, columns: int = 16) -> torch.Tensor:
    """All frames (uint8 [F, H, W, 3]) side by side in rows of at most `columns`, on white: uint8 [H', W', 3]."""
    frames = frames_FHWc.cpu().numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width = frames.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), _WHITE, np.uint8)
    for index, frame in enumerate(frames):
        top, left = (_GAP + (index // columns) * (height + _GAP), _GAP + (index % columns) * (width + _GAP))
        sheet[top : top + height, left : left + width] = frame
    return torch.from_numpy(sheet)


def trajectory_picture(
    videos: Sequence[torch.Tensor] | None,
    texts: Sequence[str] | None,
    labels: Sequence[str] | None = None,
    *,
    scale: int | None = None,
    max_rows: int = 12,
    max_columns: int = 8,
) -> torch.Tensor:
    """Rows are denoising steps: label, the step's frames, the step's text. Returns uint8 [H', W', 3].

    videos: per step uint8 [F, H, W, 3], or None; texts: per step, or None; not both None. labels: such as "t 0.25".
    More steps or frames than max_rows, max_columns are thinned evenly, first and last kept. Raises ValueError where the
    three differ in length or are empty.
    """
    lengths = {len(part) for part in (videos, texts, labels) if part is not None}
    if (videos is None and texts is None) or len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"videos, texts and labels must hold one entry for each step, got lengths {sorted(lengths)}")
    from PIL import Image, ImageDraw, ImageFont

    font = _font(ImageFont)
    strips = _strips(videos, scale, max_columns) if videos is not None else []
    steps = _even(lengths.pop(), max_rows)
    strip_width = strips[0].shape[1] if strips else 0
    strip_height = strips[0].shape[0] if strips else 0
    label_width = _LABEL_WIDTH if labels is not None else 0
    text_width = _TEXT_WIDTH if texts is not None else 0
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    wrapped = [_wrap(texts[step], probe, font, text_width - 2 * _GAP) if texts is not None else [] for step in steps]
    line = _FONT + 4
    heights = [max(strip_height, line * len(lines) + _GAP, line + _GAP) for lines in wrapped]
    image = Image.new("RGB", (label_width + strip_width + text_width + _GAP, sum(heights) + _GAP), (_WHITE,) * 3)
    draw, top = ImageDraw.Draw(image), _GAP
    for step, lines, height in zip(steps, wrapped, heights, strict=True):
        if labels is not None:
            draw.text((_GAP, top + _GAP), labels[step], fill=_INK, font=font)
        if strips:
            image.paste(Image.fromarray(strips[step]), (label_width, top))
        for number, words in enumerate(lines):
            left = label_width + strip_width + 2 * _GAP
            draw.text((left, top + number * line), words, fill=_INK, font=font)
        top += height
    return torch.from_numpy(np.array(image))


def save_png(path: str | os.PathLike[str], image_HWc: torch.Tensor) -> None:
    """Write uint8 [H, W, 3] as png, whole or not at all. Raises OSError where the folder cannot be written."""
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(image_HWc.cpu().numpy()).save(temporary, format="PNG")


def _strips(videos: Sequence[torch.Tensor], scale: int | None, max_columns: int) -> list[np.ndarray]:
    """One contact sheet row per step, all of one size."""
    if len({tuple(video.shape) for video in videos}) != 1 or videos[0].ndim != 4 or videos[0].dtype != torch.uint8:
        raise ValueError("videos must be uint8 [F, H, W, 3], the same shape in every step")
    frames = _even(videos[0].shape[0], max_columns)
    if scale is None:
        scale = max(1, 64 // min(videos[0].shape[1:3]))
    return [contact_sheet(video[frames], scale=scale, columns=len(frames)).numpy() for video in videos]


def _even(count: int, limit: int) -> list[int]:
    """At most `limit` indices of range(count), evenly spread, with the first and the last."""
    if count <= limit:
        return list(range(count))
    return sorted({round(i * (count - 1) / max(1, limit - 1)) for i in range(limit)} | {count - 1})[-limit:]


def _wrap(text: str, draw: Any, font: Any, width: int) -> list[str]:
    """Lines no wider than `width` pixels; a single longer word is cut."""
    lines = [""]
    for word in text.split():
        while word and draw.textlength(word, font=font) > width:
            cut = max(1, int(len(word) * width / draw.textlength(word, font=font)) - 1)
            lines, word = [*lines, word[:cut]], word[cut:]
        trial = f"{lines[-1]} {word}".strip()
        if draw.textlength(trial, font=font) <= width:
            lines[-1] = trial
        else:
            lines.append(word)
    return [line for line in lines if line]


def _font(module: Any) -> Any:
    try:
        return module.load_default(size=_FONT)
    except (OSError, TypeError, ImportError):  # a Pillow without FreeType has only its bitmap font
        return module.load_default()

"""Everything that can be wrong with a request is found here, before any work starts."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uvg_engine.flow import Job, plan
from uvg_engine.media import read_video, resize_video
from uvg_engine.model.layout import Grid
from uvg_engine.model.patches import patch_grid
from uvg_engine.sampling.requests import Request, Video, new_seed

if TYPE_CHECKING:
    from uvg_engine.sampling.engine import Engine


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request that can be run.

    request: with its seed filled in. job: its steps. latent_shape: (C, f, h, w); grid: in patches. prompt_tokens: clean
    ids with their end mark (generate). text_len: tokens of the text stream without pads. frames: the fitted video
    (caption). temperature: of the text draws.
    """

    request: Request
    job: Job
    latent_shape: tuple[int, int, int, int]
    grid: Grid
    prompt_tokens: tuple[int, ...]
    text_len: int
    frames: Tensor | None
    temperature: float

    @property
    def seed(self) -> int:
        """Of every draw of this request."""
        assert self.request.seed is not None
        return self.request.seed

    @property
    def num_rows(self) -> int:
        """Rows of the packed matrix: both streams, of both branches where there is guidance."""
        frames, height, width = self.grid
        return (frames * height * width + self.text_len) * (1 if self.job.guidance == 1 else 2)


def prepare(request: Request, engine: Engine) -> Prepared:
    """Check a request against the engine and fill in its defaults.

    Warns (UserWarning) of prompt words that the vocabulary lacks and of a video that was fitted to another size.
    Raises ValueError on what cannot be run.
    """
    if not isinstance(request, Request):
        raise ValueError(f"request must be a Request, got {type(request).__name__}")
    defaults = engine.defaults
    size = (request.frames or defaults.frames, request.height or defaults.height, request.width or defaults.width)
    latent_shape = engine.codec.latent_shape(size)
    try:
        grid = patch_grid(latent_shape[1:], engine.model.config)
    except ValueError as error:
        raise ValueError(f"frames, height and width must suit the model, got {size}: {error}") from error
    if math.prod(latent_shape) >= 2**31:  # kernels count them in 32 bits
        raise ValueError(f"frames, height and width must make fewer than 2^31 latent values, got {size}")
    job = plan(request.kind, request.settings(defaults.jobs[request.kind]))
    prompt_tokens: tuple[int, ...] = ()
    text_len, frames = defaults.text_length, None
    if request.prompt is not None:
        prompt_tokens = _prompt_tokens(request.prompt, engine, as_text=request.kind == "generate")
    if request.kind == "generate":
        text_len = len(prompt_tokens)
    if request.video is not None:
        frames = _fitted(request.video, size)
    if request.seed is None:
        request = dataclasses.replace(request, seed=new_seed())
    temperature = defaults.temperature if request.temperature is None else request.temperature
    return Prepared(request, job, latent_shape, grid, prompt_tokens, text_len, frames, temperature)


def _prompt_tokens(prompt: str, engine: Engine, as_text: bool) -> tuple[int, ...]:
    """Ids of a prompt that is not too long for the encoder, nor, where it is the text stream, for that."""
    tokenizer, encoder = engine.tokenizer, engine.text_encoder
    ids = tokenizer.encode(prompt)
    limits = [("the text encoder reads", encoder.max_len)]
    if as_text:
        limits.append(("the text stream holds", engine.defaults.text_length - 1))
    for what, limit in limits:
        if len(ids) - 1 > limit:
            raise ValueError(
                f"prompt must have at most {limit} tokens ({what} no more), got {len(ids) - 1}: {prompt!r:.80}"
            )
    unknown = tokenizer.unknown_words(prompt)
    if unknown:
        _warn(f"the model has not learned {', '.join(map(repr, unknown))}: {prompt!r}")
    return tuple(ids)


def _fitted(video: Video, size: tuple[int, int, int]) -> Tensor:
    if isinstance(video, Tensor):
        name, frames = "video", video
    else:
        name, frames = str(video), read_video(video)[0]
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"video must be uint8 [F, H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
    frames, notice = resize_video(frames, size)
    if notice:
        _warn(f"{name}: {notice}")
    return frames


def _warn(message: str) -> None:
    """A UserWarning at the line outside of this package that led here."""
    depth, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("uvg_engine.sampling"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=depth)

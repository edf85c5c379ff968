"""The way of a sample from noise to data, kept for people to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Recorded steps, in order; the last one is the result itself.

    steps: how many of the request's steps were done by then. times: t in [0, 1] that they reached. frames: what the
    video would be if the flow went straight on from there (the data estimate), uint8 [F, H, W, 3]; None for a caption.
    texts: the tokens as they stood, end marks and pads left out; None for generate.
    """

    steps: tuple[int, ...]
    times: tuple[float, ...]
    frames: tuple[Tensor, ...] | None = field(repr=False)
    texts: tuple[str, ...] | None

    @property
    def labels(self) -> tuple[str, ...]:
        """One per recorded step, such as "t 0.25"."""
        return tuple(f"t {time:.2f}" for time in self.times)


class Recorder:
    """Collects a trajectory. keep: True for every step, else how many; the last is always among them.

    decode_video, decode_text: from a data estimate and from tokens; None where the job does not move that stream.
    """

    def __init__(
        self,
        num_steps: int,
        keep: bool | int,
        decode_video: Callable[[Tensor], Tensor] | None,
        decode_text: Callable[[Tensor], str] | None,
    ) -> None:
        count = num_steps if keep is True else min(int(keep), num_steps)
        first = num_steps if count == 1 else 1
        self._wanted = {round(first + i * (num_steps - first) / max(1, count - 1)) for i in range(count)}
        self._decode_video, self._decode_text = decode_video, decode_text
        self._steps: list[int] = []
        self._times: list[float] = []
        self._frames: list[Tensor] = []
        self._texts: list[str] = []

    def record(self, step: int, time: float, estimate: Tensor, tokens: Tensor) -> None:
        """Call after each step. step: steps done, from 1. estimate: latent [C, f, h, w]. tokens: int64 [L]."""
        if step not in self._wanted:
            return
        frames = [self._decode_video(estimate)] if self._decode_video is not None else []
        texts = [self._decode_text(tokens)] if self._decode_text is not None else []
        self._wanted.remove(step)  # a step that was interrupted further on is told again
        self._steps.append(step)
        self._times.append(time)
        self._frames += frames
        self._texts += texts

    def finish(self) -> Trajectory:
        """What was recorded."""
        return Trajectory(
            tuple(self._steps),
            tuple(self._times),
            tuple(self._frames) if self._decode_video is not None else None,
            tuple(self._texts) if self._decode_text is not None else None,
        )

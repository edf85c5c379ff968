"""The data set `digits`: 1,797 real handwritten digits (scikit-learn's `load_digits`), coloured and moving.

A clip has 8 frames of 32x32 RGB. A 16x16 digit starts at a multiple of 4 px, moves by whole pixels and bounces at the
borders by reflection of its position. Sample `index` is a pure function of (seed, split, index): its numbers come from
numpy's Philox with key (seed, split) and counter (0, index, 0, 0), whatever else was drawn. Source of the digits: UCI
ML hand-written digits.

Shape letters: B clips, F frames, Y rows, X columns, S sprite side, N source images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from .digits_text import COLORS, DIRECTIONS, PLACES, make_caption, make_prompt

NUM_FRAMES, SIZE, SPRITE = 8, 32, 16
FPS = 4
REACH = SIZE - SPRITE  # the sprite's upper left corner lies in 0..REACH on each axis
RGB = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 40, 255), "yellow": (255, 255, 0),
    "magenta": (255, 0, 255), "cyan": (0, 255, 255), "white": (255, 255, 255), "orange": (255, 128, 0),
}  # fmt: skip
SPLITS = ("train", "heldout")
COMBINATIONS = ("seen", "unseen", "half", "all")
_RGB = np.array([RGB[name] for name in COLORS], dtype=np.float32)
VELOCITY = {  # unit steps (y, x); y grows downwards
    "still": (0, 0), "right": (0, 1), "left": (0, -1), "up": (-1, 0), "down": (1, 0),
    "up-right": (-1, 1), "up-left": (-1, -1), "down-right": (1, 1), "down-left": (1, -1),
}  # fmt: skip
_GRID = 4  # px: starts lie on it, so that few offsets to a model's patches occur
_UNIFORMS = 16  # drawn per sample before its texts


@dataclass(frozen=True)
class DigitAttrs:
    """What a clip shows. speed: None for a still digit. bounces: reflections of both axes. image: sklearn's index."""

    digit: int
    color: str
    direction: str
    speed: str | None
    start: str
    end: str
    bounces: int
    image: int = -1
    seen: bool = True  # False: (digit, color, direction) never occurs in training

    def to_dict(self) -> dict:
        """The fields as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Sample:
    """One clip: frames uint8 [F, Y, X, 3], its prompt, its detailed caption, what it shows (None: not known)."""

    frames: torch.Tensor
    prompt: str
    caption: str
    attrs: DigitAttrs | None


@functools.cache
def source_images() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits: images float32 [N, 8, 8] in [0, 1] and labels int64 [N]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images / 16.0).astype(np.float32), bunch.target.astype(np.int64)


@functools.cache
def split_indices(split: str) -> np.ndarray:
    """sklearn's indices of one split, sorted. Of each class every sixth image, in order, is held out: 1501 and 296."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    labels = source_images()[1]
    rank = np.zeros(len(labels), dtype=np.int64)
    for digit in range(10):
        where = np.flatnonzero(labels == digit)
        rank[where] = np.arange(len(where))
    heldout = rank % 6 == 5
    return np.flatnonzero(heldout if split == "heldout" else ~heldout)


def is_unseen(digit: int, color: int, direction: int) -> bool:
    """The rule for combinations kept out of training: 72 of 720, one digit for each (color, direction) pair.

    Every pair of attributes still occurs in training; only the triple is new.
    """
    return (digit + 3 * color + 7 * direction) % 10 == 0


def simulate(start: int, velocity: int) -> tuple[list[int], int]:
    """Positions of one axis over the frames, reflected at 0 and REACH, and the number of reflections."""
    positions, position, bounces = [start], start, 0
    for _ in range(NUM_FRAMES - 1):
        position += velocity
        if position < 0 or position > REACH:
            position = -position if position < 0 else 2 * REACH - position
            velocity, bounces = -velocity, bounces + 1
        positions.append(position)
    return positions, bounces


def third(position: int) -> int:
    """0, 1 or 2: the third of the reachable range that holds `position` (0..REACH)."""
    return min(2, int(3 * position / REACH))


@functools.cache
def starts(velocity: int, place: int) -> tuple[int, ...]:
    """Start positions of one axis within third `place` that leave no doubt about place and direction.

    Multiples of the grid; no reflection in the first two transitions, neither start nor end within 0.5 px of a border
    between thirds.
    """
    borders = (REACH / 3, 2 * REACH / 3)

    def admissible(start: int) -> bool:
        end = simulate(start, velocity)[0][-1]
        clear = all(abs(p - border) >= 0.5 for p in (start, end) for border in borders)
        return clear and 0 <= start + 2 * velocity <= REACH

    return tuple(p for p in range(0, REACH + 1, _GRID) if third(p) == place and admissible(p))


@dataclass(frozen=True)
class _Draw:
    """Everything random about one clip, drawn and ready to paint."""

    attrs: DigitAttrs
    track_y: list[int]
    track_x: list[int]
    affine: tuple[float, float, float, float]  # output offset -> source offset, row-major (yy, yx, xy, xx)
    gain: float
    gamma: float
    prompt: str
    caption: str


def _affine(u: np.ndarray) -> tuple[float, float, float, float]:
    """Rotation up to 10 degrees, scale 0.9..1.1 per axis, shear up to 0.1, as the inverse map."""
    angle = math.radians(10) * (2 * u[0] - 1)
    cos, sin, shear = math.cos(angle), math.sin(angle), 0.2 * u[3] - 0.1
    sy, sx = 1 / (0.9 + 0.2 * u[1]), 1 / (0.9 + 0.2 * u[2])
    return (sy * cos, -sy * sin, sx * (sin + shear * cos), sx * (cos - shear * sin))


def sprites(images: np.ndarray, affine: np.ndarray | None = None) -> np.ndarray:
    """Bilinear upscaling of images fp32 [B, 8, 8] to [B, S, S], through affine [B, 4] where given; outside is black."""
    num, side = images.shape[0], images.shape[1]
    centre = (np.arange(SPRITE, dtype=np.float32) + 0.5) * (side / SPRITE) - side / 2  # offset from the image's centre
    dy, dx = np.meshgrid(centre, centre, indexing="ij")
    if affine is None:
        affine = np.tile(np.array([1, 0, 0, 1], dtype=np.float32), (num, 1))
    m = affine.astype(np.float32)[:, :, None, None]
    y = m[:, 0] * dy + m[:, 1] * dx + (side / 2 + 0.5)  # +1 of it for the black frame below
    x = m[:, 2] * dy + m[:, 3] * dx + (side / 2 + 0.5)
    y, x = np.clip(y, 0, side + 0.999), np.clip(x, 0, side + 0.999)
    iy, ix = y.astype(np.int64), x.astype(np.int64)
    fy, fx = y - iy, x - ix
    wide = side + 2
    flat = np.pad(images, ((0, 0), (1, 1), (1, 1))).ravel()
    at = np.arange(num)[:, None, None] * (wide * wide) + iy * wide + ix
    top = flat[at] * (1 - fx) + flat[at + 1] * fx
    bottom = flat[at + wide] * (1 - fx) + flat[at + wide + 1] * fx
    return top * (1 - fy) + bottom * fy


class DigitsDataset:
    """Clips of moving handwritten digits, made on the fly.

    split: "train" (1501 images) or "heldout" (296). seed: 0 <= seed < 2**64. augment: small rotation, scale, shear and
    stroke changes of the image, train only. combinations: "seen", "unseen", "half" (even indices seen, odd unseen) or
    "all" of the (digit, color, direction) triples; by default "seen" for train and "half" for heldout. size: its `len`.
    """

    clip_shape = (NUM_FRAMES, SIZE, SIZE)
    fps = FPS

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        *,
        augment: bool = False,
        combinations: str | None = None,
        size: int = 1 << 20,
    ):
        images, labels = source_images()
        chosen = split_indices(split)
        combinations = combinations or ("seen" if split == "train" else "half")
        if combinations not in COMBINATIONS:
            raise ValueError(f"combinations must be one of {COMBINATIONS}, got {combinations!r}")
        if not isinstance(augment, bool):
            raise ValueError(f"augment must be True or False, got {augment!r}")
        if augment and split != "train":
            raise ValueError(f"augment must be False outside the train split, got split={split!r}")
        for name, value in (("seed", seed), ("size", size)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.split, self.seed, self.augment, self.combinations, self.size = split, seed, augment, combinations, size
        self._images = images
        self._by_digit = [chosen[labels[chosen] == digit] for digit in range(10)]

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Sample]:
        return (self.item(i) for i in range(self.size))

    def __getitem__(self, index: int) -> Sample:
        return self.item(index)

    def item(self, index: int) -> Sample:
        """Sample `index`, the same in every process. IndexError outside 0..len-1."""
        one = self.batch([index])
        return Sample(one["frames"][0], one["prompts"][0], one["captions"][0], one["attrs"][0])

    def batch(self, indices: Sequence[int]) -> dict:
        """Samples `indices` as a dict: frames uint8 [B, 8, 32, 32, 3]; prompts, captions, attrs: lists of B."""
        draws = [self._draw(int(i)) for i in indices]
        return {
            "frames": torch.from_numpy(self._paint(draws)),
            "prompts": [d.prompt for d in draws],
            "captions": [d.caption for d in draws],
            "attrs": [d.attrs for d in draws],
        }

    def _draw(self, index: int) -> _Draw:
        if not 0 <= index < self.size:
            raise IndexError(f"index must be in [0, {self.size}), got {index}")
        key = self.seed | SPLITS.index(self.split) << 64
        rng = np.random.Generator(np.random.Philox(key=key, counter=[0, index, 0, 0]))
        u = rng.random(_UNIFORMS).tolist()
        color, direction = int(u[0] * len(COLORS)), int(u[1] * len(DIRECTIONS))
        digit = self._digit(u[2], index, color, direction)
        images = self._by_digit[digit]
        image = int(images[int(u[3] * len(images))])
        step = 0 if direction == 0 else 1 + int(u[4] * 2)
        vy, vx = (step * v for v in VELOCITY[DIRECTIONS[direction]])
        place = int(u[5] * len(PLACES))
        options_y, options_x = starts(vy, place // 3), starts(vx, place % 3)
        track_y, bounces_y = simulate(options_y[int(u[6] * len(options_y))], vy)
        track_x, bounces_x = simulate(options_x[int(u[7] * len(options_x))], vx)
        attrs = DigitAttrs(
            digit=digit, color=COLORS[color], direction=DIRECTIONS[direction], speed=(None, "slow", "fast")[step],
            start=PLACES[place], end=PLACES[3 * third(track_y[-1]) + third(track_x[-1])], bounces=bounces_y + bounces_x,
            image=image, seen=not is_unseen(digit, color, direction),
        )  # fmt: skip
        affine = _affine(u[8:12]) if self.augment else (1.0, 0.0, 0.0, 1.0)
        gain, gamma = (0.85 + 0.35 * u[12], 0.8 + 0.45 * u[13]) if self.augment else (1.0, 1.0)
        return _Draw(attrs, track_y, track_x, affine, gain, gamma, make_prompt(attrs, rng), make_caption(attrs, rng))

    def _digit(self, u: float, index: int, color: int, direction: int) -> int:
        wanted = self.combinations
        if wanted == "half":
            wanted = "unseen" if index % 2 else "seen"
        options = [d for d in range(10) if wanted == "all" or is_unseen(d, color, direction) == (wanted == "unseen")]
        return options[int(u * len(options))]

    def _paint(self, draws: list[_Draw]) -> np.ndarray:
        num = len(draws)
        frames = np.zeros((num, NUM_FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
        if not num:
            return frames
        images = self._images[[d.attrs.image for d in draws]]
        if self.augment:  # a parabola, not pow: the same bits whatever the batch
            bend = np.array([d.gamma for d in draws], dtype=np.float32)[:, None, None] - 1
            gain = np.array([d.gain for d in draws], dtype=np.float32)[:, None, None]
            images = np.clip((images - bend * images * (1 - images)) * gain, 0, 1)
        gray = sprites(images, np.array([d.affine for d in draws]))
        colors = _RGB[[COLORS.index(d.attrs.color) for d in draws]]
        painted = np.rint(gray[..., None] * colors[:, None, None]).astype(np.uint8)  # [B, S, S, 3]
        for b, draw in enumerate(draws):
            for f, (y, x) in enumerate(zip(draw.track_y, draw.track_x, strict=True)):
                frames[b, f, y : y + SPRITE, x : x + SPRITE] = painted[b]
        return frames

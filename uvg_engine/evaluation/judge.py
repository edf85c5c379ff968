"""A judge of clips that knows nothing of the model: pixels in, what a person would say out.

Color from the mean of the bright pixels, motion from the brightness centroid's track against every bouncing track of
the digits world, digit from an SVM trained on scikit-learn's digits (train split only), asked about every frame.

Shape letters: F frames, Y rows, X columns, K kept features.
"""

from __future__ import annotations

import functools

import numpy as np

from uvg_engine.training.data.digits import (
    NUM_FRAMES,
    REACH,
    RGB,
    SIZE,
    VELOCITY,
    simulate,
    source_images,
    split_indices,
    sprites,
    starts,
    third,
)
from uvg_engine.training.data.digits_text import COLORS, DIRECTIONS, PLACES

_FLOOR = 0.25  # pixels darker than this share of the clip's brightest one are background
_INK = 0.35  # the same for the blurred clip, which decides where ink can be
_DARK = 32  # a clip whose brightest value is below this shows nothing
_WINDOW = 16  # px, side of the crop around the centroid; halved to 8x8 features
_OFF_GRID = 0.02  # cost of a start the world does not use, px^2: it only breaks ties


def _soften(gray_BYX: np.ndarray) -> np.ndarray:
    """A 3x3 blur with weights 1 2 1 on each axis; outside is black. Same shape."""
    wide = np.pad(gray_BYX, ((0, 0), (1, 1), (1, 1)))
    rows = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4


def _bright(value_FYX: np.ndarray) -> np.ndarray:
    """Brightness in [0, 1] over the floor, relative to the brightest pixel: float64 [F, Y, X].

    A pixel counts only where its neighbourhood is bright too: grain in the background would move the centroid.
    """
    soft = _soften(value_FYX)
    ink = soft > _INK * max(float(soft.max()), 1.0)
    peak = max(float(value_FYX[ink].max(initial=1.0)), 1.0)
    return np.clip(value_FYX / peak - _FLOOR, 0, None) / (1 - _FLOOR) * ink


def _centroids(bright_FYX: np.ndarray) -> np.ndarray:
    """Centre of brightness per frame, px: [F, 2] as (y, x); the middle of the frame where all is dark."""
    mass = bright_FYX.sum(axis=(1, 2))
    rows, columns = np.arange(bright_FYX.shape[1]), np.arange(bright_FYX.shape[2])
    moment = np.stack([(bright_FYX.sum(axis=2) * rows).sum(1), (bright_FYX.sum(axis=1) * columns).sum(1)], axis=1)
    middle = (np.array(bright_FYX.shape[1:]) - 1) / 2
    return np.where(mass[:, None] > 0, moment / np.maximum(mass, 1e-9)[:, None], middle)


def _features(bright_FYX: np.ndarray, centroids_F2: np.ndarray) -> np.ndarray:
    """A window centred on the centroid (bilinear, so no fraction of a pixel shows), halved, normed: [F, 64]."""
    pad = _WINDOW
    padded = np.pad(bright_FYX, ((0, 0), (pad, pad), (pad, pad)))
    corner = centroids_F2 - (_WINDOW - 1) / 2 + pad
    whole = np.floor(corner).astype(np.int64)
    fy, fx = (corner - whole)[:, :1, None], (corner - whole)[:, 1:, None]
    span = np.arange(_WINDOW + 1)
    frame = np.arange(len(bright_FYX))[:, None, None]
    patch = padded[frame, (whole[:, :1] + span)[:, :, None], (whole[:, 1:] + span)[:, None, :]]
    patch = patch[:, :-1] * (1 - fy) + patch[:, 1:] * fy
    patch = patch[:, :, :-1] * (1 - fx) + patch[:, :, 1:] * fx
    half = patch.reshape(-1, _WINDOW // 2, 2, _WINDOW // 2, 2).mean(axis=(2, 4)).reshape(len(patch), -1)
    return half / np.maximum(np.linalg.norm(half, axis=1, keepdims=True), 1e-9)


def _training_crops() -> tuple[np.ndarray, np.ndarray]:
    """Brightness of sprites, and labels: the train digits as they are, and gently bent, turned, blurred."""
    images, labels = source_images()
    chosen = split_indices("train")
    images, labels = images[chosen], labels[chosen]
    turn = np.deg2rad(8.0)
    variants = []
    for angle, bend in ((0.0, 0.0), (turn, 0.2), (-turn, -0.25)):
        affine = np.tile([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], (len(images), 1))
        variants.append(sprites(images - bend * images * (1 - images), affine))
    variants.append(_soften(variants[0]))
    crops = np.pad(np.concatenate(variants).astype(np.float64) * 255, ((0, 0), (1, 1), (1, 1)))
    bright = np.concatenate([_bright(crop[None]) for crop in crops])
    return bright[:, 1:-1, 1:-1], np.tile(labels, len(variants))


@functools.cache
def _classifier():
    """The SVM, and each class's mean centroid offset from the sprite's corner [10, 2]; fitted once per process."""
    from sklearn.svm import SVC

    crops, labels = _training_crops()
    centroids = _centroids(crops)
    svm = SVC(C=10.0, gamma=3.0, decision_function_shape="ovr").fit(_features(crops, centroids), labels)
    offsets = np.stack([centroids[labels == digit].mean(axis=0) for digit in range(10)])
    return svm, offsets


@functools.cache
def _tracks(velocity: int) -> tuple[np.ndarray, np.ndarray]:
    """Every track of one axis at `velocity`: positions [K, F] and the cost [K] of starts outside the world's rules."""
    usual = {start for place in range(3) for start in starts(velocity, place)}
    tracks = [simulate(start, velocity)[0] for start in range(REACH + 1)]
    return np.array(tracks, dtype=np.float64), np.array([0.0 if s in usual else _OFF_GRID for s in range(REACH + 1)])


def _fit_axis(track_F: np.ndarray, velocity: int, offset: float) -> tuple[float, int]:
    """Best start for one axis, the digit's offset near the usual one: mean squared error in px^2, and the start."""
    tracks, cost = _tracks(velocity)
    gap = track_F - tracks - offset
    shift = gap.mean(axis=1, keepdims=True)
    error = ((gap - shift) ** 2).mean(axis=1) + 0.05 * shift[:, 0] ** 2 + cost
    best = int(error.argmin())
    return float(error[best]), best


def _motion(centroids_F2: np.ndarray, offset_2: np.ndarray) -> dict:
    """The direction, speed and places whose simulated track is nearest to the centroids; error: px^2."""
    fits = {
        (axis, v): _fit_axis(centroids_F2[:, axis], v, float(offset_2[axis])) for axis in (0, 1) for v in range(-2, 3)
    }
    options = []
    for direction in DIRECTIONS:
        for step, speed in ((0, None),) if direction == "still" else ((1, "slow"), (2, "fast")):
            vy, vx = (step * unit for unit in VELOCITY[direction])
            (error_y, y), (error_x, x) = fits[0, vy], fits[1, vx]
            options.append((error_y + error_x, direction, speed, (y, vy), (x, vx)))
    options.sort(key=lambda option: option[0])
    error, direction, speed, along_y, along_x = options[0]
    (track_y, bounces_y), (track_x, bounces_x) = simulate(*along_y), simulate(*along_x)
    margin = options[1][0] - error
    return {
        "direction": direction,
        "speed": speed,
        "start": PLACES[3 * third(track_y[0]) + third(track_x[0])],
        "end": PLACES[3 * third(track_y[-1]) + third(track_x[-1])],
        "bounces": bounces_y + bounces_x,
        "error": error,
        "margin": margin,
    }


def _color(frames_FYX3: np.ndarray, bright_FYX: np.ndarray) -> tuple[str, float]:
    """The named color nearest in RGB direction to the bright pixels' mean, and how much nearer than the next."""
    mean = (frames_FYX3 * (bright_FYX**2)[..., None]).sum(axis=(0, 1, 2))
    mean = mean / max(float(np.linalg.norm(mean)), 1e-9)
    palette = np.array([RGB[name] for name in COLORS], dtype=np.float64)
    angle = np.arccos(np.clip(palette / np.linalg.norm(palette, axis=1, keepdims=True) @ mean, -1, 1))
    first, second = np.sort(angle)[:2]
    return COLORS[int(angle.argmin())], float(1 - first / max(second, 1e-9))


def judge(frames) -> dict:
    """What a clip of the digits world shows: digit, color, direction, speed, start, end, bounces, confidence.

    frames: uint8 [8, 32, 32, 3], torch or numpy. speed is None where still. confidence: dict of digit, color, motion in
    [0, 1], a score of how clearly the first answer beats the second, not a probability. A dark clip gives None
    throughout. ValueError on another shape or dtype.
    """
    clip = np.asarray(frames)
    if clip.shape != (NUM_FRAMES, SIZE, SIZE, 3) or clip.dtype != np.uint8:
        expected = f"uint8 ({NUM_FRAMES}, {SIZE}, {SIZE}, 3)"
        raise ValueError(f"frames must be {expected}, got {clip.dtype} {tuple(clip.shape)}")
    value = clip.max(axis=-1)
    if int(value.max()) < _DARK:
        nothing = dict.fromkeys(("digit", "color", "direction", "speed", "start", "end", "bounces"))
        return {**nothing, "confidence": {"digit": 0.0, "color": 0.0, "motion": 0.0}}
    svm, offsets = _classifier()
    bright = _bright(value.astype(np.float64))
    centroids = _centroids(bright)
    scores = svm.decision_function(_features(bright, centroids)).mean(axis=0)
    digit = int(scores.argmax())
    first, second = np.sort(scores)[::-1][:2]
    motion = _motion(centroids, offsets[digit])
    color, color_confidence = _color(clip, bright)
    error, margin = motion.pop("error"), motion.pop("margin")
    confidence = {
        "digit": float(np.clip(first - second, 0, 1)),
        "color": color_confidence,
        "motion": float(margin / (margin + error + 1e-9)),
    }
    return {"digit": digit, "color": color, **motion, "confidence": confidence}

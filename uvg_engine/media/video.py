"""Video files: read any, write mp4 (PyAV), gif and contact sheets (Pillow), fit to a size.

Frames are uint8 [F, H, W, 3], RGB. Every bad input is one `VideoError` that names the file and what is wrong with it.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import stat
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from uvg_engine.files import replacing
from uvg_engine.media._arguments import is_positive

_log = logging.getLogger(__name__)

# Demuxers of video files only: a playlist or a list of files could open other paths or the network.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,ogg,asf,gif,apng,yuv4mpegpipe"
)
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # that an mp4 or mov begins with
_MAX_BYTES = 1 << 30
_VISIBLE = 256  # a shorter side below this many pixels is shown enlarged
_FASTEST_GIF = 50  # frames a second; players take a frame of less than 0.02 s as "very slow"
_WIDEST = 4096  # but not past this longer side, which players and encoders still take


class VideoError(ValueError):
    """A video file that cannot be read or written; the message is for the person who named the file."""


def read_video(path: str | os.PathLike[str]) -> tuple[torch.Tensor, float]:
    """Frames uint8 [F, H, W, 3] and frames per second of the first video stream, upright.

    Past 1 GiB of pixels the frames are thinned evenly in time (fps falls with them, a warning is logged), so any length
    fits in memory. Raises VideoError: no such file, empty, no video, no frames, truncated, corrupt.
    """
    path = _existing(path)
    _check_whole(path)
    import av

    kept: list[np.ndarray] = []
    stride = count = 0
    try:
        with av.open(_plain(path), options={"format_whitelist": _FORMATS}, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise VideoError(f"{path}: no video stream in this file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stride, rate = 1, stream.average_rate or stream.guessed_rate
            for count, frame in enumerate(container.decode(stream), 1):
                if (count - 1) % stride:
                    continue
                image = frame.to_ndarray(format="rgb24")
                kept.append(np.rot90(image, round((getattr(frame, "rotation", 0) or 0) / 90) % 4))
                if len(kept) > 2 and image.nbytes * len(kept) > _MAX_BYTES:
                    kept, stride = kept[::2], stride * 2
    except av.error.FFmpegError as error:
        place = f" after frame {count}" if count else ""
        raise VideoError(f"{path}: not a readable video{place}: {error.strerror or error}") from error
    if not kept:
        raise VideoError(f"{path}: the video stream has no frames")
    if len({image.shape for image in kept}) > 1:
        raise VideoError(f"{path}: the frame size changes within the video")
    if stride > 1:
        _log.warning("%s: long video, every %d-th of %d frames read", path, stride, count)
    return torch.from_numpy(np.stack(kept)), float(rate or 25) / stride


def write_video(
    path: str | os.PathLike[str], frames_FHWc: torch.Tensor, fps: float = 8.0, *, scale: int | None = None
) -> None:
    """Write .mp4 (h264), .gif, or .png (a contact sheet); the suffix decides. The file appears whole or not at all.

    frames uint8 [F, H, W, 3]. scale: enlarge every pixel to scale x scale; None enlarges small videos to 256 pixels or
    more, which also keeps each pixel's colour in yuv420p. fps: in [0.01, 1000]; gif shows times in hundredths of a
    second, two at least (past 50 a warning is logged), and joins equal neighbours; a png has none. Raises VideoError
    for a bad shape, rate, suffix or folder.
    """
    path = Path(path)
    frames = _check_frames(frames_FHWc).cpu().numpy()
    check_fps(fps)
    if scale is not None and (isinstance(scale, bool) or scale != int(scale) or not 1 <= scale <= 64):
        raise VideoError(f"scale must be an integer in [1, 64], got {scale}")
    writers = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_png}
    if path.suffix.lower() not in writers:
        raise VideoError(f"{path}: the name must end in one of {', '.join(writers)}, got {path.suffix!r}")
    if path.is_dir():
        raise VideoError(f"{path}: is a folder")
    if path.suffix.lower() == ".gif" and fps > _FASTEST_GIF:
        _log.warning("%s: a gif shows at most %d frames a second, not %g", path, _FASTEST_GIF, fps)
    try:
        with replacing(path) as temporary:
            writers[path.suffix.lower()](temporary, frames, float(fps), scale)
    except OSError as error:  # PyAV's errors are OSErrors too
        what = f"no such folder: {path.parent}" if error.errno == errno.ENOENT else error.strerror or str(error)
        raise VideoError(f"{path}: cannot be written: {what}") from error
    except VideoError as error:  # a writer knows the temporary name alone
        raise VideoError(f"{path}: {error}") from error


def check_fps(fps: Any) -> None:
    """Raise VideoError unless it is a number of frames a second that a file can hold."""
    number = isinstance(fps, Real) and not isinstance(fps, bool)
    if not (number and 0.01 <= fps <= 1000):
        raise VideoError(f"fps must be a number in [0.01, 1000], got {fps!r:.80}")


def resize_video(frames_FHWc: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, str | None]:
    """Fit uint8 [F, H, W, 3] to (F, H, W); the second value tells a person what changed, None if nothing did.

    Time: nearest frames, evenly spaced. Space: area mean where both sides shrink, else antialiased bilinear; the aspect
    is not kept. Deterministic.
    """
    frames = _check_frames(frames_FHWc)
    want = tuple(shape)
    if len(want) != 3 or not all(map(is_positive, want)):
        raise ValueError(f"shape must be (F, H, W), all positive integers, got {want}")
    have = tuple(frames.shape[:3])
    if have == want:
        return frames, None
    if have[0] != want[0]:
        index = ((torch.arange(want[0], dtype=torch.float64) + 0.5) * (have[0] / want[0])).floor().long()
        frames = frames[index.clamp_max(have[0] - 1).to(frames.device)]
    if have[1:] != want[1:]:
        frames = torch.stack([_resize_frame(frame, want[1:]) for frame in frames])
    return frames, f"video fitted: {_describe(have)} -> {_describe(want)}"


def default_scale(height: int, width: int) -> int:
    """Pixel enlargement at which a video can be looked at: 1 from 256 pixels and where 2 would be too large, else even,
    as yuv420p likes."""
    short, long = min(height, width), max(height, width)
    if short >= _VISIBLE and height % 2 == 0 and width % 2 == 0:
        return 1
    return 2 * min(math.ceil(_VISIBLE / (2 * short)), _WIDEST // (2 * long)) or 1


def _write_mp4(path: Path, frames: np.ndarray, fps: float, scale: int | None) -> None:
    import av

    if "libx264" not in av.codecs_available:
        raise VideoError("mp4 needs a PyAV with libx264; write a .gif instead")
    scale = scale or default_scale(*frames.shape[1:3])
    height, width = frames.shape[1] * scale, frames.shape[2] * scale
    # 4:2:0 plays everywhere; 4:4:4 only where 4:2:0 cannot hold the size or would mix the colours of small pixels
    even = height % 2 == 0 and width % 2 == 0
    pix_fmt = "yuv420p" if even and (scale > 1 or min(height, width) >= _VISIBLE) else "yuv444p"
    try:
        with av.open(_plain(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
            stream.options = {"crf": "12", "preset": "medium"}
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = 1  # limited
            for image in frames:
                frame = av.VideoFrame.from_ndarray(_planes(image, scale, pix_fmt), format=pix_fmt)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except av.error.FFmpegError as error:
        raise VideoError(f"mp4 of {width}x{height} cannot be written: {error.strerror or error}") from error


def _planes(image_HWc: np.ndarray, scale: int, pix_fmt: str) -> np.ndarray:
    """RGB to BT.709 limited-range planes, enlarged (after, so a pixel stays one colour), in PyAV's layout."""
    r, g, b = np.moveaxis(image_HWc.astype(np.float32) / 255, -1, 0)
    luma = 0.2126 * r + 0.7152 * g + 0.0722 * b
    yuv = np.stack([16 + 219 * luma, 128 + 112 * (b - luma) / 0.9278, 128 + 112 * (r - luma) / 0.7874])
    yuv = yuv.repeat(scale, axis=1).repeat(scale, axis=2)
    if pix_fmt == "yuv444p":
        return np.rint(yuv).astype(np.uint8)
    height, width = yuv.shape[1:]
    chroma = yuv[1:].reshape(2, height // 2, 2, width // 2, 2).mean((2, 4))
    return np.rint(np.concatenate([yuv[0].ravel(), chroma.ravel()])).astype(np.uint8).reshape(-1, width)


def _write_gif(path: Path, frames: np.ndarray, fps: float, scale: int | None) -> None:
    from PIL import Image

    scale = scale or default_scale(*frames.shape[1:3])
    enlarged = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    images = [Image.fromarray(image).quantize(256, dither=Image.Dither.NONE) for image in enlarged]
    duration = 10 * round(100 / min(fps, _FASTEST_GIF))
    try:
        images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)
    except OverflowError as error:
        raise VideoError(f"a gif shows a frame, and equal ones after it, for 655 s at most, got fps {fps:g}") from error


def _write_png(path: Path, frames: np.ndarray, fps: float, scale: int | None) -> None:
    from uvg_engine.media.pictures import contact_sheet, save_png

    scale = scale or max(1, 128 // min(frames.shape[1:3]))  # many frames lie side by side
    save_png(path, contact_sheet(torch.from_numpy(frames), scale=scale))


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise VideoError(f"{path}: is a folder, not a video file")
        if not stat.S_ISREG(info.st_mode):
            raise VideoError(f"{path}: is not a regular file")
        if info.st_size == 0:
            raise VideoError(f"{path}: is empty")
        path.open("rb").close()
    except FileNotFoundError as error:
        raise VideoError(f"{path}: no such file") from error
    except OSError as error:
        raise VideoError(f"{path}: cannot be read: {error.strerror}") from error
    return path


def _plain(path: Path) -> str:
    """The name as FFmpeg takes it for a file's: in one such as 12:30.mp4 it sees the protocol "12"."""
    return os.path.abspath(path)


def _check_whole(path: Path) -> None:
    """Refuse a file that is shorter than it says itself: FFmpeg would play what is there and say nothing. Containers
    made for streams (ts, flv, ogg, wmv) tell no length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start[4:] in _BOXES:
            end = _end_of_boxes(file, size)
        elif start[:4] == b"\x1a\x45\xdf\xa3":
            end = _end_of_segment(file)
        elif start[:4] == b"RIFF":  # the length of what follows these 8 bytes, or of all; -1: not known
            end = int.from_bytes(start[4:], "little", signed=True)
        elif start[:3] == b"GIF":
            end = _end_of_blocks(file)
        else:
            return
    if end > size:
        raise VideoError(f"{path}: truncated: {size} bytes of at least {end}")


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """Of an mp4 or mov: the end of the top-level box that runs past the file's; 0 where none does."""
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if at + length > size and kind.isalnum():
            return at + length
        if length < 8:  # 0: to the end of the file; else trailing bytes that are no box; FFmpeg decides
            return 0
        at += length
    return 0


def _end_of_blocks(file: BinaryIO) -> int:
    """Of a gif: where its blocks end, the last one maybe past the file's end. What follows them is not looked at."""

    def colors(flags: bytes) -> int:  # bytes of a table of colors; none where the file ends before its flags
        return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0

    file.seek(10)
    at = 13 + colors(file.read(1))
    while True:
        file.seek(at)
        head = file.read(10)
        if head[:1] == b"!":
            at += 2
        elif head[:1] == b",":
            at += 11 + colors(head[9:])
        else:
            return at
        length = 1
        while length:  # each part begins with its length, the last one has none
            file.seek(at)
            length = int.from_bytes(file.read(1), "big")
            at += 1 + length


def _end_of_segment(file: BinaryIO) -> int:
    """Of an mkv or webm: the end of its segment; 0 where that is not known."""
    file.seek(4)
    file.seek(_ebml_size(file), os.SEEK_CUR)
    known = file.read(4) == b"\x18\x53\x80\x67"
    length = _ebml_size(file) if known else 0
    return length and file.tell() + length


def _ebml_size(file: BinaryIO) -> int:
    """A size in EBML: as many bytes as the first has zeros at its front, and one more. 0 where it is not known."""
    first = int.from_bytes(file.read(1), "big")
    width = 9 - first.bit_length()
    value = int.from_bytes(bytes([first & 0xFF >> width]) + file.read(width - 1), "big")
    return 0 if width > 8 or value == (1 << 7 * width) - 1 else value


def _check_frames(frames: torch.Tensor) -> torch.Tensor:
    if not isinstance(frames, torch.Tensor) or frames.dtype != torch.uint8:
        raise VideoError(f"frames must be a uint8 tensor, got {getattr(frames, 'dtype', type(frames).__name__)}")
    if frames.ndim != 4 or frames.shape[-1] != 3 or min(frames.shape) < 1:
        raise VideoError(f"frames must be [F, H, W, 3] with F, H, W at least 1, got {tuple(frames.shape)}")
    return frames


def _resize_frame(frame_HWc: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    image = frame_HWc.permute(2, 0, 1)[None].float()
    if size[0] <= image.shape[2] and size[1] <= image.shape[3]:
        image = torch.nn.functional.interpolate(image, size=size, mode="area")
    else:
        image = torch.nn.functional.interpolate(image, size=size, mode="bilinear", antialias=True, align_corners=False)
    return image[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)


def _describe(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} frame{'' if shape[0] == 1 else 's'} of {shape[2]}x{shape[1]}"

"""Video files: colours survive, every bad file is one clear error, nothing is left behind."""

import os
import resource
import signal
from fractions import Fraction

import numpy as np
import pytest
import torch

from uvg_engine.media import (
    VideoError,
    contact_sheet,
    read_video,
    resize_video,
    save_png,
    trajectory_picture,
    write_video,
)
from uvg_engine.media.video import default_scale

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255), (255, 128, 0)]


def moving_square(frames=8, size=32):
    video = torch.zeros(frames, size, size, 3, dtype=torch.uint8)
    for i in range(frames):
        colour = torch.tensor(COLOURS[i % len(COLOURS)], dtype=torch.uint8)
        video[i, 3 + i : 14 + i, 2 + 2 * i : 13 + 2 * i] = colour
    return video


@pytest.mark.parametrize(
    ("scale", "mean", "worst"), [(None, 0.5, 8), (8, 0.5, 8), (4, 0.5, 8), (2, 1.0, 24), (1, 1.5, 255)]
)
def test_saturated_colours_survive_mp4(tmp_path, scale, mean, worst):
    video = moving_square()
    write_video(tmp_path / "a.mp4", video, 12.5, scale=scale)
    frames, fps = read_video(tmp_path / "a.mp4")
    assert fps == pytest.approx(12.5) and frames.dtype == torch.uint8
    assert tuple(frames.shape) == (8, 32 * (scale or 8), 32 * (scale or 8), 3)
    small, notice = resize_video(frames, (8, 32, 32))
    assert (notice is None) == (scale == 1)
    error = (small.float() - video.float()).abs()
    assert error.mean() < mean and error.max() <= worst
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_plays_where_people_play_it(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(), 29.97)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert abs(stream.average_rate - Fraction(30000, 1001)) < Fraction(1, 100)
        frame = next(container.decode(stream))
        assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (2, 31, 33), (1, 2, 300)])
def test_odd_sizes(tmp_path, shape):
    video = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, scale in [("a.mp4", None), ("a.mp4", 3), ("a.gif", None), ("a.png", None)]:
        write_video(tmp_path / name, video, 8, scale=scale)
        if name == "a.mp4":
            frames, _ = read_video(tmp_path / name)
            factor = scale or default_scale(*shape[1:])
            assert tuple(frames.shape) == (shape[0], shape[1] * factor, shape[2] * factor, 3)


def test_default_scale():
    assert [default_scale(*s) for s in [(32, 32), (32, 64), (256, 256), (480, 832), (301, 400), (2, 300)]] == [
        8,
        8,
        1,
        1,
        2,
        12,
    ]
    assert default_scale(3001, 4000) == default_scale(2, 4000) == 1, "twice as large is more than players take"
    assert all(default_scale(s, s) * s >= 256 and default_scale(s, s) * s % 2 == 0 for s in range(1, 300))


def test_gif(tmp_path):
    video = moving_square()
    write_video(tmp_path / "a.gif", video, 10, scale=2)
    frames, fps = read_video(tmp_path / "a.gif")
    assert fps == pytest.approx(10, rel=0.2)
    small, _ = resize_video(frames, (8, 32, 32))
    assert (small.float() - video.float()).abs().mean() < 1


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_a_name_with_a_colon_is_no_protocol(suffix, tmp_path, monkeypatch):
    """FFmpeg took 12:30.mp4 for a place of the protocol "12"."""
    monkeypatch.chdir(tmp_path)
    write_video(f"12:30{suffix}", moving_square())
    assert os.listdir() == [f"12:30{suffix}"]
    if suffix != ".png":
        assert read_video(f"12:30{suffix}")[0].shape == (8, 256, 256, 3)


def test_png_is_a_contact_sheet(tmp_path):
    write_video(tmp_path / "a.png", moving_square(20), 8, scale=1)
    sheet = np.array(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (2 * 36 + 4, 16 * 36 + 4, 3)
    assert np.array_equal(sheet[4:36, 4:36], moving_square(20)[0].numpy())
    assert np.array_equal(sheet[40:72, 40:72], moving_square(20)[17].numpy())


@pytest.mark.parametrize("fps", [0.01, 0.25, 29.97, 1000, np.float32(12.5), np.int64(12), Fraction(30000, 1001)])
def test_any_number_is_a_rate(fps, tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(), fps)
    assert read_video(tmp_path / "a.mp4")[1] == pytest.approx(float(fps), rel=1e-6)


def test_a_gif_shows_at_most_50_frames_a_second_and_says_so(tmp_path, caplog):
    write_video(tmp_path / "a.gif", moving_square(), 50)
    assert caplog.text == ""
    write_video(tmp_path / "a.gif", moving_square(), 60)
    assert "a.gif: a gif shows at most 50 frames a second, not 60" in caplog.text
    assert read_video(tmp_path / "a.gif")[1] == pytest.approx(50)
    write_video(tmp_path / "slow.gif", moving_square(), 0.01)
    with Image.open(tmp_path / "slow.gif") as picture:
        assert picture.info["duration"] == 100_000
    with pytest.raises(VideoError, match=r"still.gif: a gif shows a frame, and equal ones .* at most, got fps 0.01"):
        write_video(tmp_path / "still.gif", moving_square()[:1].expand(8, -1, -1, -1), 0.01)
    assert not (tmp_path / "still.gif").exists()


SUFFIXES = ("a.mp4", "a.gif", "a.png")
NO_RATES = (0, -1, 0.001, 1001, 10**400, float("nan"), float("inf"), True, "8", None, torch.tensor(8.0))


def test_refusals_on_write(tmp_path):
    video = moving_square()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("x")
    bad = [
        ("a.avi", video, 8, "must end in"),
        ("a", video, 8, "must end in"),
        ("none/a.mp4", video, 8, "no such folder"),
        ("file/a.mp4", video, 8, "cannot be written"),
        ("folder.mp4", video, 8, "is a folder"),
        ("a.mp4", video.float(), 8, "uint8"),
        ("a.mp4", video[0], 8, r"\[F, H, W, 3\]"),
        ("a.mp4", video[:0], 8, "at least 1"),
        ("a.mp4", video.numpy(), 8, "tensor"),
        *[(name, video, fps, r"fps must be a number in \[0\.01, 1000\], got") for name in SUFFIXES for fps in NO_RATES],
    ]
    for name, frames, fps, message in bad:
        with pytest.raises(VideoError, match=message):
            write_video(tmp_path / name, frames, fps)
    with pytest.raises(VideoError, match="scale"):
        write_video(tmp_path / "a.mp4", video, 8, scale=0)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_a_full_disk_is_told_with_the_name_of_the_file(suffix, tmp_path):
    """The limit for a file's size fails as a full disk does."""
    path, (soft, hard) = tmp_path / f"a{suffix}", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(VideoError, match=rf"^{path}: .*cannot be written: File too large"):
            write_video(path, moving_square(), 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(tmp_path) == []


def test_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, moving_square(), 8)
    before = path.read_bytes()
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return planes(*args)

    from uvg_engine.media import video as module

    planes = module._planes
    monkeypatch.setattr(module, "_planes", fail)
    with pytest.raises(KeyboardInterrupt):
        write_video(path, moving_square(), 8)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.mp4"]


def audio_only(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def zero_frames(path):
    """A video track without packets (Matroska keeps the track; its name here is wrong on purpose)."""
    with av.open(str(path), "w", format="matroska") as container:
        video = container.add_stream("libx264", rate=8)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        audio = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(audio.encode(frame))
        container.mux(audio.encode())


def test_bad_files_are_one_clear_error(tmp_path):
    write_video(tmp_path / "good.mp4", moving_square(), 8)
    good = (tmp_path / "good.mp4").read_bytes()
    audio_only(tmp_path / "audio.mp4")
    zero_frames(tmp_path / "zero.mp4")
    (tmp_path / "folder.mp4").mkdir()
    files = {
        "empty.mp4": b"",
        "text.mp4": b"a red seven moving right\n" * 20,
        "half.mp4": good[: len(good) // 2],
        "last.mp4": good[:-1],
        "head.mp4": good[:20],
        "noise.mp4": np.random.default_rng(0).bytes(4000),
        "list.mp4": b"ffconcat version 1.0\nfile good.mp4\n",
        "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    want = {
        "missing.mp4": "no such file",
        "folder.mp4": "is a folder",
        "empty.mp4": "is empty",
        "half.mp4": "truncated",
        "last.mp4": "truncated",
        "audio.mp4": "no video stream",
        "zero.mp4": "no frames",
    }
    for name in [*files, *want]:
        with pytest.raises(VideoError, match=want.get(name, "not a readable video|truncated")) as caught:
            read_video(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "avi", "gif"])
def test_a_file_that_is_cut_off_is_told(suffix, tmp_path):
    """FFmpeg plays what is there of it and says nothing."""
    path, video = tmp_path / f"a.{suffix}", moving_square()
    if suffix in ("mp4", "gif"):
        write_video(path, video, scale=4)
    else:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for image in video.numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    whole = path.read_bytes()
    assert len(read_video(path)[0]) == 8
    for length in (len(whole) - 20, len(whole) * 2 // 3, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(VideoError, match=rf"a.{suffix}: truncated: {length} bytes of at least "):
            read_video(path)
    unmarked = [whole[:-1]] if suffix == "gif" else []  # without its end mark
    for data in (whole + bytes(3), whole + b"\n;" * 40, *unmarked):
        path.write_bytes(data)
        assert len(read_video(path)[0]) == 8


def test_hostile_bytes_never_escape_videoerror(tmp_path):
    write_video(tmp_path / "good.mp4", moving_square(3), 8, scale=1)
    good = (tmp_path / "good.mp4").read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(40):
        data = bytearray(good)
        for place in rng.integers(32, len(data), rng.integers(1, 30)):
            data[place] = rng.integers(256)
        (tmp_path / "bad.mp4").write_bytes(data)
        try:
            frames, fps = read_video(tmp_path / "bad.mp4")
        except VideoError:
            continue
        assert frames.dtype == torch.uint8 and frames.shape[-1] == 3 and fps > 0


def test_phone_rotation_is_applied(tmp_path):
    video = torch.zeros(2, 32, 64, 3, dtype=torch.uint8)
    video[:, :16, :32, 0] = 255  # red, top left
    write_video(tmp_path / "a.mp4", video, 8, scale=4)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    for index, value in enumerate([0, one, 0, -one, 0, 0]):  # a quarter turn clockwise
        data[matrix + 4 * index : matrix + 4 * index + 4] = value.to_bytes(4, "big", signed=True)
    (tmp_path / "turned.mp4").write_bytes(data)
    frames, _ = read_video(tmp_path / "turned.mp4")
    small, _ = resize_video(frames, (2, 64, 32))
    assert frames.shape[1:3] == (256, 128)
    assert (small.int() - video.rot90(-1, (1, 2)).int()).abs().float().mean() < 1


def test_long_video_is_thinned(tmp_path, monkeypatch, caplog):
    from uvg_engine.media import video as module

    video = torch.zeros(20, 16, 16, 3, dtype=torch.uint8)
    video += (torch.arange(20, dtype=torch.uint8) * 12)[:, None, None, None]
    write_video(tmp_path / "a.mp4", video, 20, scale=1)
    monkeypatch.setattr(module, "_MAX_BYTES", 16 * 16 * 3 * 8)
    frames, fps = read_video(tmp_path / "a.mp4")
    assert len(frames) <= 8 and fps == pytest.approx(5) and "every 4-th of 20" in caplog.text
    assert (frames[:, 0, 0, 0].int() - video[::4, 0, 0, 0].int()).abs().max() <= 3


def test_resize():
    video = moving_square()
    same, notice = resize_video(video, (8, 32, 32))
    assert same is video and notice is None
    fitted, notice = resize_video(video, (4, 16, 64))
    assert tuple(fitted.shape) == (4, 16, 64, 3) and fitted.dtype == torch.uint8
    assert notice == "video fitted: 8 frames of 32x32 -> 4 frames of 64x16"
    times = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 2, 2, 3)
    assert resize_video(times, (3, 2, 2))[0][:, 0, 0, 0].tolist() == [1, 3, 5]
    assert resize_video(times, (12, 2, 2))[0][:, 0, 0, 0].tolist() == [i // 2 for i in range(12)]
    assert resize_video(times[:1], (5, 2, 2))[0].sum() == 0
    big = video.repeat_interleave(3, 1).repeat_interleave(3, 2)
    assert torch.equal(resize_video(big, (8, 32, 32))[0], video)
    assert resize_video(video[:1], (1, 1, 1))[1].startswith("video fitted: 1 frame of 32x32")
    for shape in ((0, 32, 32), (8.0, 32, 32), (8, 32), (True, 32, 32)):
        with pytest.raises(ValueError, match="shape must be"):
            resize_video(video, shape)


def test_trajectory_picture(tmp_path):
    videos = [moving_square(10)] * 30
    texts = ["<mask> " * 40, "a red seven", "", "x" * 500, "é 红 ☃"] * 6
    picture = trajectory_picture(videos, texts, [f"t {i / 29:.2f}" for i in range(30)], max_rows=5)
    assert picture.dtype == torch.uint8 and picture.ndim == 3 and picture.shape[0] > 5 * 64
    save_png(tmp_path / "t.png", picture)
    assert np.array_equal(np.array(Image.open(tmp_path / "t.png")), picture.numpy())
    only_text = trajectory_picture(None, texts)
    only_video = trajectory_picture(videos, None)
    assert only_text.shape[1] < picture.shape[1] and only_video.shape[1] < picture.shape[1]
    for arguments in [(None, None), ([], []), (videos, texts[:3]), ([videos[0], videos[0][:1]], None)]:
        with pytest.raises(ValueError):
            trajectory_picture(*arguments)
    assert contact_sheet(videos[0], scale=2, columns=3).shape == (4 * 68 + 4, 3 * 68 + 4, 3)

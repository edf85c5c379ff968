"""uvg generate, caption, joint: the files they write and read, and what they say of a caller's mistakes."""

import io
import json
import os
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from uvg_engine import Engine
from uvg_engine.cli._files import print_json
from uvg_engine.media import read_video, write_video

PROMPT = "a red seven moving right, fast"


def clip(shape=(8, 32, 32), seed=0):
    return torch.randint(256, (*shape, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def document(ran):
    """The one JSON document of a command that went well."""
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png", "A.MP4"])
@pytest.mark.parametrize("job", ["generate", "joint"])
def test_each_suffix_gives_its_file(uvg, model, job, name):
    ran = uvg(job, PROMPT, "-o", name, "--model", model, "--seed", 3)
    assert ran.code == 0 and ran.err == "" and f"{name}: 8 frames of 32x32, seed 3\n" in ran.out
    assert os.listdir() == [name]
    if name.lower().endswith("mp4"):
        frames, fps = read_video(name)
        assert len(frames) == 8 and fps == 4.0
        return
    with Image.open(name) as picture:
        assert picture.format == name[-3:].upper()
        assert picture.n_frames > 1 if name.endswith("gif") else picture.width > 4 * picture.height


def test_json_tells_everything(uvg, model):
    told = document(uvg("generate", PROMPT, "-o", "a.png", "--model", model, "--seed", 3, "--json"))
    (result,) = told["results"]
    assert told["job"] == "generate" and told["model"] == model and told["seconds"] >= 0
    assert result == {
        "prompt": PROMPT, "file": "a.png", "seed": 3, "fps": 4.0, "frames": 8, "height": 32, "width": 32,
    }  # fmt: skip
    told = document(uvg("joint", PROMPT, "-o", "a.png", "--model", model, "--seed", 3, "--json"))
    assert isinstance(told["results"][0].pop("text"), str) and told["results"] == [result]


def test_several_prompts_give_numbered_files_and_seeds(uvg, model):
    line = ("generate", PROMPT, "a blue one", "-o", "a.png", "--model", model, "--json")
    results = document(uvg(*line, "--seed", 5, "--trajectory", "t.png"))["results"]
    assert [(r["prompt"], r["file"], r["seed"], r["trajectory"]) for r in results] == [
        (PROMPT, "a-1.png", 5, "t-1.png"),
        ("a blue one", "a-2.png", 6, "t-2.png"),
    ]
    assert sorted(os.listdir()) == ["a-1.png", "a-2.png", "t-1.png", "t-2.png"]
    uvg("generate", "a blue one", "-o", "alone.png", "--model", model, "--seed", 6)
    assert Path("alone.png").read_bytes() == Path("a-2.png").read_bytes()


def test_a_seed_is_drawn_told_and_repeats_the_result(uvg, model):
    line = ("joint", PROMPT, "--model", model, "--json")
    one, two = (document(uvg(*line, "-o", f"{name}.png"))["results"][0] for name in ("one", "two"))
    assert one["seed"] != two["seed"] and Path("one.png").read_bytes() != Path("two.png").read_bytes()
    again = document(uvg(*line, "-o", "again.png", "--seed", one["seed"]))["results"][0]
    assert again["text"] == one["text"] and Path("again.png").read_bytes() == Path("one.png").read_bytes()


def test_every_option_reaches_the_engine(uvg, model, engine):
    video = {"num_steps": 3, "guidance": 2.5, "shift": 2.0, "solver": "unipc", "seeds": 7}
    video |= {"frames": 4, "height": 16, "width": 32}
    text = {"text_rule": "progress", "temperature": 0.5}
    options = ["--steps", 3, "--seed", 7, "--size", "4x16x32", "--model", model, "--device", "cpu", "--json"]
    options += ["--threads", torch.get_num_threads()]
    flow = ["--guidance", 2.5, "--shift", 2.0, "--solver", "unipc"]
    rule = ["--text-rule", "progress", "--temperature", 0.5]

    uvg("generate", PROMPT, "-o", "got.png", *options, *flow)
    write_video("want.png", engine.generate(PROMPT, **video)[0].frames)
    assert Path("got.png").read_bytes() == Path("want.png").read_bytes()

    told = document(uvg("joint", PROMPT, "-o", "got.png", *options, *flow, *rule))["results"][0]
    (want,) = engine.joint(PROMPT, **video, **text)
    write_video("want.png", want.frames)
    assert Path("got.png").read_bytes() == Path("want.png").read_bytes() and told["text"] == want.text

    write_video("clip.gif", clip((4, 16, 32)), scale=1)
    told = document(uvg("caption", "clip.gif", *options, *rule))["results"][0]
    own = {name: value for name, value in video.items() if name not in ("guidance", "shift", "solver")}
    assert told["text"] == engine.caption("clip.gif", **own, **text)[0].text and told["seed"] == 7


@pytest.mark.parametrize("job", ["generate", "joint"])
def test_fps_is_that_of_the_file(uvg, model, job):
    line = (job, PROMPT, "--model", model, "--seed", 3)
    told = document(uvg(*line, "-o", "a.mp4", "--fps", 12.5, "--json"))["results"][0]
    assert told["fps"] == read_video("a.mp4")[1] == 12.5
    uvg(*line, "-o", "usual.gif")
    ran = uvg(*line, "-o", "a.gif", "--fps", 60)
    assert ran.code == 0 and ran.err == "note: a.gif: a gif shows at most 50 frames a second, not 60\n"
    (usual, slow), (frames, fast) = read_video("usual.gif"), read_video("a.gif")
    assert fast == pytest.approx(50 / 4 * slow) and torch.equal(usual, frames)


def test_precision_reaches_the_engine(uvg, model):
    assert uvg("generate", PROMPT, "-o", "got.png", "--model", model, "--seed", 7, "--precision", "int8").code == 0
    in_bytes = Engine.from_pretrained(model, precision="int8").generate(PROMPT, seeds=7)[0]
    write_video("want.png", in_bytes.frames)
    assert Path("got.png").read_bytes() == Path("want.png").read_bytes()


def test_an_existing_file_is_replaced(uvg, model):
    Path("a.png").write_text("something else")
    assert uvg("generate", PROMPT, "-o", "a.png", "--model", model).code == 0
    with Image.open("a.png") as sheet:
        sheet.verify()
    assert os.listdir() == ["a.png"]


@pytest.mark.parametrize("job", ["generate", "caption", "joint"])
def test_trajectory_is_a_picture_of_all_steps(uvg, model, job):
    write_video("clip.mp4", clip())
    line = ["caption", "clip.mp4"] if job == "caption" else [job, PROMPT, "-o", "a.png"]
    heights = []
    for steps in (2, 6):
        assert uvg(*line, "--model", model, "--steps", steps, "--trajectory", "t.png", "--seed", 1).code == 0
        with Image.open("t.png") as picture:
            heights.append(picture.height)
    assert heights[1] > 2 * heights[0]


def test_caption_prints_the_text_and_for_several_files_whose(uvg, model):
    for name in ("a.mp4", "b.gif"):
        write_video(name, clip())
    one = uvg("caption", "a.mp4", "--model", model, "--seed", 1, "--temperature", 0)
    both = uvg("caption", "a.mp4", "b.gif", "--model", model, "--seed", 1, "--temperature", 0)
    assert one.code == both.code == 0 and one.out.count("\n") == 1
    first, second = both.out.splitlines()
    assert first == f"a.mp4: {one.out.strip()}" and second.startswith("b.gif: ")
    told = document(uvg("caption", "a.mp4", "b.gif", "--model", model, "--seed", 1, "--json"))
    assert [(r["file"], r["seed"]) for r in told["results"]] == [("a.mp4", 1), ("b.gif", 2)]


def test_a_video_of_another_size_is_fitted_with_a_note(uvg, model):
    write_video("large.mp4", clip((5, 50, 90)), scale=1)
    ran = uvg("caption", "large.mp4", "--model", model)
    assert ran.code == 0 and ran.err == "note: large.mp4: video fitted: 5 frames of 90x50 -> 8 frames of 32x32\n"


def test_names_of_files_that_are_no_text(uvg, model):
    """Any bytes may be one. They were an error where they were told, after the work."""
    line = ("generate", PROMPT, "-o", "a\udcff.png", "--model", model, "--seed", 1)
    ran = uvg(*line)
    assert ran.code == 0 and ran.out == "a\\udcff.png: 8 frames of 32x32, seed 1\n" and os.listdir() == ["a\udcff.png"]
    assert document(uvg(*line, "--json"))["results"][0]["file"] == "a\udcff.png"


def test_json_where_stdout_is_ascii(monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", written)
    print_json({"prompt": "é 红"})
    written.seek(0)
    assert json.load(written) == {"prompt": "é 红"}


@pytest.mark.parametrize("job", ["generate", "joint"])
def test_notes_on_prompts_that_the_model_cannot_follow(uvg, model, job):
    ran = uvg(job, "a purple elephant", "a red one", "-o", "a.png", "--model", model)
    assert ran.code == 0 and ran.err == "note: the model has not learned 'purple', 'elephant': 'a purple elephant'\n"
    ran = uvg(job, " ", "-o", "a.png", "--model", model)
    assert ran.code == 0 and ran.err.startswith("note: an empty prompt") and ran.err.count("\n") == 1


def _audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _no_frames(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(4))
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()


def _truncated(path):
    write_video(path, clip())
    path.write_bytes(path.read_bytes()[:-100])


BAD_VIDEOS = {
    "missing": lambda path: None,
    "empty": lambda path: path.touch(),
    "corrupt": lambda path: path.write_bytes(b"\x00\x01not a video" * 99),
    "text": lambda path: path.write_text("hello"),
    "folder": lambda path: path.mkdir(),
    "audio only": _audio_only,
    "no frames": _no_frames,
    "truncated": _truncated,
}


@pytest.mark.parametrize("kind", BAD_VIDEOS)
def test_a_bad_video_is_one_clear_error(uvg, model, kind):
    BAD_VIDEOS[kind](Path("bad.mp4"))
    write_video("good.mp4", clip())
    ran = uvg("caption", "good.mp4", "bad.mp4", "--model", model, "--trajectory", "t.png")
    assert ran.code == 2 and ran.out == "" and not list(Path().glob("t*.png"))
    (error,) = [line for line in ran.err.splitlines() if not line.startswith("note: good.mp4: video fitted")]
    assert error.startswith("error: bad.mp4: ")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("-o a.avi", "--output must end in .mp4, .gif, .png, got a.avi"),
        ("-o a", "--output must end in .mp4, .gif, .png, got a"),
        ("-o nowhere/a.mp4", "--output must lie in a folder that exists, got nowhere/a.mp4"),
        ("-o folder.mp4", "--output must be a file, got the folder folder.mp4"),
        ("-o a.png --trajectory t.jpg", "--trajectory must end in .png, got t.jpg"),
        ("-o a.png --trajectory ./a.png", "--trajectory must be a file of its own, got a.png"),
        ("-o a.mp4 --size 8x32", "--size must be FRAMESxHEIGHTxWIDTH, such as 8x32x32, got '8x32'"),
        ("-o a.mp4 --size 0x32x32", "--size must be FRAMESxHEIGHTxWIDTH, such as 8x32x32, got '0x32x32'"),
        ("-o a.mp4 --size 5x32x32", "multiples of the block (4, 8, 8), got (5, 32, 32)"),
        ("-o a.mp4 --size 8x80000x80000", "make fewer than 2^31 latent values, got (8, 80000, 80000)"),
        ("-o a.mp4 --steps 0", "num_steps must be an integer of at least 1, got 0"),
        ("-o a.mp4 --steps 1000000000", "steps must be at most 100000, got 1000000000"),
        ("-o a.mp4 --fps 0", "fps must be a number in [0.01, 1000], got 0.0"),
        ("-o a.gif --fps nan", "fps must be a number in [0.01, 1000], got nan"),
        ("-o a.png --fps 8", "--fps must go with a .mp4 or .gif, got a.png"),
        ("-o a.mp4 --guidance nan", "guidance must be finite, got nan"),
        ("-o a.mp4 --shift 0", "shift must be finite and positive, got 0.0"),
        ("-o a.mp4 --shift 1e-300", "steps and shift must leave the noise levels apart, got 2 and 1e-300"),
        ("-o a.mp4 --solver rk4", "solver must be one of euler, unipc, got 'rk4'"),
        ("-o a.mp4 --text-rule magic", "text_rule must be one of euler, exact, progress, got 'magic'"),
        ("-o a.mp4 --temperature -1", "temperature must be finite and at least 0, got -1.0"),
        ("-o a.mp4 --seed 9223372036854775808", "seed must be an integer in [-2^63, 2^63), got 9223372036854775808"),
        ("-o a.mp4 --device tpu", "--device must be cpu or cuda, got 'tpu'"),
        ("-o a.mp4 --device meta", "--device must be cpu or cuda, got 'meta'"),
        ("-o a.mp4 --device cuda:99", "--device"),
        ("-o a.mp4 --precision int4", "--precision must be full, or int8 on the CPU, got 'int4'"),
        ("-o a.mp4 --model nowhere", "--model nowhere: "),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(uvg, model, options, told):
    Path("folder.mp4").mkdir()
    where = [] if "--model" in options else ["--model", model]
    ran = uvg("joint", "a red one", *options.split(), *where)
    assert ran.code == 2 and ran.out == "" and ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert told in ran.err and os.listdir() == ["folder.mp4"]


@pytest.mark.parametrize(("job", "words", "limit"), [("generate", 12, 11), ("joint", 17, 16)])
def test_a_prompt_too_long_for_the_text_stream_or_the_encoder(uvg, model, job, words, limit):
    assert uvg(job, "red " * (words - 1), "-o", "fits.png", "--model", model).code == 0
    ran = uvg(job, "red " * words, "-o", "a.png", "--model", model)
    assert ran.code == 2 and ran.err.startswith(f"error: prompt must have at most {limit} tokens")
    assert ran.err.count("\n") == 1 and os.listdir() == ["fits.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(uvg, model):
    Path("locked").mkdir(mode=0o500)
    ran = uvg("generate", PROMPT, "-o", "locked/a.mp4", "--model", model)
    assert (
        ran.code == 2 and ran.err == "error: --output must lie in a folder that can be written to, got locked/a.mp4\n"
    )


DAMAGE = {
    "gone": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "other": lambda path: path.write_text("[]"),
}


@pytest.mark.parametrize("file", ["engine.json", "tokenizer.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_one_clear_error(uvg, model, file, damage):
    shutil.copytree(model, "bad")
    DAMAGE[damage](Path("bad", file))
    ran = uvg("generate", PROMPT, "-o", "a.mp4", "--model", "bad")
    assert ran.code == 2 and ran.err.startswith("error: --model bad: ") and ran.err.count("\n") == 1
    assert file in ran.err and os.listdir() == ["bad"]

"""What cannot be run is told in one line each, before any work starts; what is left out is filled in."""

import json
import math
import os
import warnings

import numpy as np
import pytest
import torch
from tiny import DEFAULTS, TEXT_LENGTH, alone, bits, make_engine, make_model, make_video

from uvg_engine.flow import FlowSettings
from uvg_engine.media import HashTextEncoder, PixelCodec, VideoError, WordTokenizer
from uvg_engine.sampling import EngineDefaults, Request

VIDEO = make_video()
GREY = VIDEO[..., :1]
LAST = 2**63 - 1  # the largest seed


class CountingEncoder(HashTextEncoder):
    """Counts the prompts it has encoded: the first work of a request."""

    def __init__(self):
        super().__init__(16, 9)
        self.encoded = 0

    def encode(self, texts):
        self.encoded += len(texts)
        return super().encode(texts)


@pytest.fixture(scope="module")
def engine():
    return make_engine(text_encoder=CountingEncoder())


REQUESTS = [
    ("kind must be one of generate, caption, joint, got 'paint'", {"kind": "paint"}),
    ("prompt must be a string, got NoneType", {"kind": "generate"}),
    ("prompt must be a string, got int", {"kind": "joint", "prompt": 5}),
    (r"prompt must be Unicode text, got 'a .udcff red'", {"kind": "generate", "prompt": "a \udcff red"}),
    ("video must be a uint8 tensor or a path, got NoneType", {"kind": "caption"}),
    ("video must be a uint8 tensor or a path, got list", {"kind": "caption", "video": [1]}),
    ("video must not be given to generate", {"video": "a.mp4"}),
    ("text_rule must not be given to generate, got 'euler'", {"text_rule": "euler"}),
    ("temperature must not be given to generate, got 0.5", {"temperature": 0.5}),
    ("prompt must not be given to caption, got 'a'", {"kind": "caption", "video": VIDEO, "prompt": "a"}),
    ("guidance must not be given to caption, got 5", {"kind": "caption", "video": VIDEO, "guidance": 5}),
    ("solver must not be given to caption, got 'euler'", {"kind": "caption", "video": VIDEO, "solver": "euler"}),
    ("video must not be given to joint", {"kind": "joint", "prompt": "a", "video": "a.mp4"}),
    *(
        (rf"seed must be an integer in \[-2\^63, 2\^63\), got {v}", {"seed": v})
        for v in (2**63, -(2**63) - 1, 1.5, True)
    ),
    *(
        (f"{name} must be an integer of at least 1, got {value}", {name: value})
        for name in ("num_steps", "frames", "height", "width")
        for value in (0, -3, 2.0, True)
    ),
    *((f"guidance must be finite, got {value!r}", {"guidance": value}) for value in (math.nan, math.inf, "5", True)),
    *((f"shift must be finite and positive, got {v!r}", {"shift": v}) for v in (math.nan, math.inf, "3", 0, -1.0)),
    ("solver must be one of euler, unipc, got 'rk4'", {"solver": "rk4"}),
    ("text_rule must be one of euler, exact, progress, got 'x'", {"kind": "joint", "prompt": "a", "text_rule": "x"}),
    *(
        (f"temperature must be finite and at least 0, got {v!r}", {"kind": "joint", "prompt": "a", "temperature": v})
        for v in (-0.1, math.nan, math.inf, "1", True)
    ),
    *(
        (f"trajectory must be True, False or a number of steps, got {v!r}", {"trajectory": v})
        for v in (-1, 1.5, "all", None)
    ),
]


@pytest.mark.parametrize("match, fields", REQUESTS)
def test_a_request_that_cannot_be(match, fields):
    with pytest.raises(ValueError, match=match):
        Request(**{"kind": "generate", **({} if "kind" in fields else {"prompt": "a"}), **fields})


MISFITS = [
    ("request must be a Request, got str", lambda path: "a red seven"),
    ("frames, height and width must be multiples of the block", lambda path: Request("generate", "a", frames=3)),
    (
        r"frames, height and width must suit the model, got \(4, 20, 16\)",
        lambda path: Request("joint", "a", height=20),
    ),
    (
        "prompt must have at most 6 tokens .the text stream holds no more., got 7",
        lambda path: Request("generate", "one " * TEXT_LENGTH),
    ),
    (
        "prompt must have at most 9 tokens .the text encoder reads no more., got 10",
        lambda path: Request("joint", "one " * 10),
    ),
    ("video must be uint8 .F, H, W, 3., got torch.float32", lambda path: Request("caption", video=VIDEO / 255)),
    (r"video must be uint8 .F, H, W, 3., got .* \(16, 16, 3\)", lambda path: Request("caption", video=VIDEO[0])),
    (r"video must be uint8 .F, H, W, 3., got .* \(0, 16, 16, 3\)", lambda path: Request("caption", video=VIDEO[:0])),
    (r"video must be uint8 .F, H, W, 3., got .* \(4, 16, 16, 1\)", lambda path: Request("caption", video=GREY)),
    ("must make fewer than 2.31 latent values, got", lambda path: Request("joint", "a", height=2**17, width=2**17)),
    ("none.mp4: no such file", lambda path: Request("caption", video=path / "none.mp4")),
    ("is a folder, not a video file", lambda path: Request("caption", video=os.fspath(path))),
]  # fmt: skip


@pytest.mark.parametrize("match, make", MISFITS)
def test_a_request_that_this_engine_cannot_run(engine, tmp_path, match, make):
    """The sound one before it has not been touched when the error comes."""
    before, steps = engine.text_encoder.encoded, []
    with pytest.raises(ValueError, match=match):
        engine.run([Request("generate", "one"), make(tmp_path)], callback=lambda *step: steps.append(step))
    assert engine.text_encoder.encoded == before and steps == []


def test_a_file_that_is_no_video(engine, tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("not a video at all")
    with pytest.raises(VideoError, match=r"text.mp4: not a readable video"):
        engine.caption(path)


CALLS = [
    (r"seeds must have one entry a request \(2\), got 1", lambda e: e.generate(["one", "two"], seeds=[1])),
    (r"seed must be an integer in \[-2\^63, 2\^63\), got '12'", lambda e: e.generate(["one", "two"], seeds="12")),
    (r"seed must be an integer in \[-2\^63, 2\^63\), got 0.5", lambda e: e.generate(["one", "two"], seeds=[1, 0.5])),
    (r"seed must be an integer in .*, got 9223372036854775808", lambda e: e.joint(["a"] * 2, seeds=LAST)),
    ("prompts must be a string or a list of strings, got int", lambda e: e.generate(7)),
    ("prompts must be a string or a list of strings, got NoneType", lambda e: e.joint(None)),
    ("prompt must be a string, got list", lambda e: e.generate(np.array([["one", "two"]]))),
    ("prompt must be a string, got bytes", lambda e: e.joint(np.array([b"one"]))),
    ("prompt must be a string, got float", lambda e: e.joint(np.array([1.5]))),
    ("prompts must be a string or a list of strings, got float", lambda e: e.generate(np.array(1.5))),
    ("prompt must be a string, got Tensor", lambda e: e.generate([torch.ones(2)])),
    ("videos must be a uint8 tensor, a path or a list of them, got int", lambda e: e.caption(7)),
    ("video must be a uint8 tensor or a path, got int", lambda e: e.caption([7])),
    ("max_rows must be an integer of at least 1, got 0", lambda e: e.scheduler(max_rows=0)),
    ("max_rows must be an integer of at least 1, got 2.5", lambda e: e.scheduler(max_rows=2.5)),
    ("max_rows must be an integer of at least 1, got True", lambda e: e.scheduler(max_rows=True)),
    ("request must be a Request, got NoneType", lambda e: list(e.stream([None]))),
]  # fmt: skip


@pytest.mark.parametrize("match, call", CALLS)
def test_a_call_that_cannot_be(engine, match, call):
    before = engine.text_encoder.encoded
    with pytest.raises(ValueError, match=match):
        call(engine)
    assert engine.text_encoder.encoded == before


NO_MASK = WordTokenizer(["one"])
NO_MASK.mask_id = None  # as a transformers tokenizer without one
PARTS = [
    ("codec must have 12 channels like the model, got 6", {"codec": PixelCodec((2, 4, 4), (1, 1, 2))}),
    ("text encoder must have text_dim 16 like the model, got 8", {"text_encoder": HashTextEncoder(8)}),
    ("tokenizer must have at most 26 ids like the model, got 31", {"tokenizer": WordTokenizer(map(str, range(27)))}),
    ('source must be "uniform" where the tokenizer has no', {"tokenizer": NO_MASK, "defaults": {"source": "mask"}}),
    ("must be multiples of the block", {"defaults": {"height": 18}}),
    ("must be divisible by the patch", {"defaults": {"height": 20}}),
    ("max_rows must be an integer of at least 1, got 0", {"max_rows": 0}),
]


@pytest.mark.parametrize("match, parts", PARTS)
def test_parts_that_do_not_fit(match, parts):
    with pytest.raises(ValueError, match=match):
        make_engine(**parts)


SETTINGS = [
    ("frames must be a positive integer, got 0", {"frames": 0}),
    ("text_length must be a positive integer, got True", {"text_length": True}),
    ("name must be a string, got 5", {"name": 5}),
    (r"fps must be a number in \[0.01, 1000\], got 0", {"fps": 0}),
    (r"fps must be a number in \[0.01, 1000\], got inf", {"fps": math.inf}),
    (r"fps must be a number in \[0.01, 1000\], got 5000", {"fps": 5000}),
    ("source must be one of uniform, mask, got 'noise'", {"source": "noise"}),
    ("temperature must be finite and at least 0, got -1", {"temperature": -1}),
    ("jobs must be a mapping of generate, caption, joint, got {'paint': {}}", {"jobs": {"paint": {}}}),
    ("jobs must be a mapping of generate, caption, joint, got 3", {"jobs": 3}),
    ("jobs.joint must be a mapping, got 3", {"jobs": {"joint": 3}}),
    (r"jobs.joint must name fields of FlowSettings, got unknown \['stpes'\]", {"jobs": {"joint": {"stpes": 3}}}),
    ("jobs.joint must be settings of a flow, .*: steps must be an integer", {"jobs": {"joint": {"steps": 0}}}),
    ("jobs.joint must be settings of a flow, .*: must be real number", {"jobs": {"joint": {"guidance": "5"}}}),
    ("jobs.joint must be settings .*: integer_times must be true or false", {"jobs": {"joint": {"integer_times": 1}}}),
    (r"got unknown \['colour'\], missing \[\]", {"colour": 1}),
]


@pytest.mark.parametrize("match, values", SETTINGS)
def test_defaults_that_cannot_be(match, values):
    with pytest.raises(ValueError, match=match):
        EngineDefaults.from_dict({**DEFAULTS, **values})


def test_defaults_that_are_not_all_there():
    with pytest.raises(ValueError, match=r"missing \['frames', 'height', 'width'\]"):
        EngineDefaults.from_dict({"text_length": 4})
    with pytest.raises(ValueError, match="defaults must be a mapping, got 4"):
        EngineDefaults.from_dict(4)


def test_defaults_come_back_from_plain_values():
    jobs = {"generate": FlowSettings(steps=7, solver="unipc"), "caption": {"text_rule": "exact"}}
    defaults = EngineDefaults(4, 16, 16, 7, name="m", fps=12, source="mask", temperature=0.5, jobs=jobs)
    assert EngineDefaults.from_dict(defaults.to_dict()) == defaults
    assert defaults.jobs["generate"].steps == 7 and defaults.jobs["joint"] == FlowSettings()
    assert defaults.jobs["caption"].text_rule == "exact"
    plain = json.loads(json.dumps(EngineDefaults(4, 16, 16, 7, fps=np.float32(12.5)).to_dict()))
    assert EngineDefaults.from_dict(plain).fps == 12.5


def test_the_engine_fills_in_what_a_request_leaves_out():
    settings = {
        "steps": 3,
        "guidance": 2.0,
        "shift": 2.0,
        "solver": "unipc",
        "text_rule": "exact",
        "caption_shift": 2.0,
    }
    given = {"num_steps": 3, "guidance": 2.0, "shift": 2.0, "solver": "unipc", "text_rule": "exact", "temperature": 0.3}
    size = {"frames": 4, "height": 16, "width": 16}
    model = make_model()
    filled = make_engine(
        model, defaults={"temperature": 0.3, "jobs": dict.fromkeys(("generate", "joint", "caption"), settings)}
    )
    plain = make_engine(model, defaults={"frames": 8, "height": 8, "width": 8})
    kinds = {
        "generate": ({"prompt": "one"}, ("text_rule", "temperature")),
        "joint": ({"prompt": "one"}, ()),
        "caption": ({"video": VIDEO}, ("guidance", "solver")),
    }
    for kind, (subject, foreign) in kinds.items():
        own = {name: value for name, value in (given | size).items() if name not in foreign}
        short, full = (Request(kind, seed=5, **subject), Request(kind, seed=5, **subject, **own))
        assert bits(alone(filled, short)) == bits(alone(plain, full))


def test_seeds(engine):
    """None draws one for each, a number counts up, a list is one each; the result tells what gives its bits again."""
    prompts = ["one"] * 3
    drawn = engine.generate(prompts, num_steps=1)
    assert len({result.seed for result in drawn}) == 3 and all(0 <= result.seed < 2**53 for result in drawn)
    assert not torch.equal(drawn[0].latent, drawn[1].latent)
    again = engine.generate(prompts, num_steps=1, seeds=[result.seed for result in drawn])
    assert list(map(bits, again)) == list(map(bits, drawn))
    counted = engine.generate(prompts, num_steps=1, seeds=-1)
    assert [result.seed for result in counted] == [-1, 0, 1]
    assert list(map(bits, engine.generate(prompts, num_steps=1, seeds=range(-1, 2)))) == list(map(bits, counted))
    mixed = engine.generate(prompts, num_steps=1, seeds=[0, None, 0])
    assert mixed[0].seed == mixed[2].seed == 0 and bits(mixed[0]) == bits(mixed[2]) == bits(counted[1])


def test_unknown_words_are_told_where_the_caller_is(engine):
    with pytest.warns(UserWarning, match=r"the model has not learned 'zebra', 'runs': 'A zebra runs'") as caught:
        engine.generate("A zebra runs", num_steps=1)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="has not learned 'zebra'"):
        engine.joint(["one", "zebra"], num_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate("A RED  seven", num_steps=1)

"""What a user does with an Engine: three jobs, callbacks, files, saving and loading, other dtypes."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SHAPE, TEXT_LENGTH, WORDS, alone, bits, make_engine, make_model, make_video, mixed_requests

import uvg_engine
from uvg_engine import sampling
from uvg_engine.media import HashTextEncoder, WordTokenizer, read_video, resize_video, write_video
from uvg_engine.sampling import CaptionResult, Engine, GenerateResult, JointResult, Request
from uvg_engine.sampling.engine import _located

LATENT = (12, 2, 4, 4)


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, uvg_engine; assert 'torch' not in sys.modules; uvg_engine.Engine; "
        "print(*({'diffusers', 'transformers', 'av', 'PIL', 'sklearn', 'scipy', 'rich', 'typer'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_the_package_has_the_names_of_sampling():
    assert set(uvg_engine.__all__) == {"__version__", *sampling.__all__}
    for name in sampling.__all__:
        assert getattr(uvg_engine, name) is getattr(sampling, name) and name in dir(uvg_engine)
    with pytest.raises(AttributeError, match="has no attribute 'Engin'"):
        _ = uvg_engine.Engin


def test_generate(engine):
    (one,) = engine.generate("a red seven", num_steps=2, seeds=1)
    assert isinstance(one, GenerateResult) and one.prompt == "a red seven" and one.seed == 1 and one.fps == 8.0
    assert one.frames.shape == (*SHAPE, 3) and one.frames.dtype == torch.uint8 and one.trajectory is None
    assert one.latent.shape == LATENT and one.latent.dtype == torch.float32
    assert torch.equal(one.frames, engine.codec.decode(one.latent))
    two = engine.generate(["a red seven", "the green one"], num_steps=2, seeds=1)
    assert [result.prompt for result in two] == ["a red seven", "the green one"] and bits(two[0]) == bits(one)
    assert engine.generate([]) == []


def test_prompts_in_an_array(engine):
    """As a column of a table comes: of str, of objects, one alone."""
    want = engine.generate(["one two", "three"], seeds=[1, 2])
    for prompts in (np.array(["one two", "three"]), np.array(["one two", "three"], dtype=object)):
        for result, other in zip(engine.generate(prompts, seeds=[1, 2]), want, strict=True):
            assert type(result.prompt) is str and result.prompt == other.prompt
            assert bits(result) == bits(other)
    assert bits(engine.generate(np.array("one two"), seeds=1)[0]) == bits(want[0])


def test_every_setting_of_generate_has_its_effect(engine):
    base = {"num_steps": 3, "guidance": 2.0, "shift": 2.0, "solver": "unipc", "seeds": 1}
    changes = {"num_steps": 4, "guidance": 3.0, "shift": 3.0, "solver": "euler", "seeds": 2}
    latents = [engine.generate("one", **base)[0].latent]
    latents += [engine.generate("one", **{**base, name: value})[0].latent for name, value in changes.items()]
    latents += [engine.generate("two", **base)[0].latent]
    assert len({latent.numpy().tobytes() for latent in latents}) == len(latents)
    (large,) = engine.generate("one", **base, frames=6, height=24, width=8)
    assert large.frames.shape == (6, 24, 8, 3) and large.latent.shape == (12, 3, 6, 2)


def test_caption(engine):
    video = make_video()
    (one,) = engine.caption(video, num_steps=3, seeds=1)
    assert isinstance(one, CaptionResult) and one.seed == 1 and one.trajectory is None
    assert len(one.tokens) == TEXT_LENGTH and one.text == engine.decode(one.tokens)
    batch = torch.stack([video, make_video(1)])
    two = engine.caption(batch, num_steps=3, seeds=1)
    assert len(two) == 2 and bits(two[0]) == bits(one) and two[1].tokens != one.tokens
    assert list(map(bits, engine.caption(list(batch), num_steps=3, seeds=1))) == list(map(bits, two))
    white = torch.full_like(video, 255)
    six = [[result.tokens for result in engine.caption([v] * 6, num_steps=3, seeds=1)] for v in (video, white)]
    assert six[0] != six[1], "the video counts"


def test_every_setting_of_caption_has_its_effect(engine):
    video, base = make_video(), {"num_steps": 4, "shift": 2.0, "text_rule": "exact", "temperature": 1.0}
    changes = {"num_steps": 2, "shift": 0.3, "text_rule": "euler", "temperature": 3.0}
    seeds = range(6)  # of all six together: a single caption may well come out the same

    def tokens(**settings):
        return tuple(result.tokens for result in engine.caption([video] * 6, seeds=seeds, **settings))

    assert len({tokens(**base), *(tokens(**{**base, k: v}) for k, v in changes.items())}) == 5


def test_joint(engine):
    (one,) = engine.joint("a red seven", num_steps=3, seeds=1)
    assert isinstance(one, JointResult) and one.prompt == "a red seven" and one.seed == 1
    assert one.frames.shape == (*SHAPE, 3) and one.latent.shape == LATENT and len(one.tokens) == TEXT_LENGTH
    assert one.text == engine.decode(one.tokens)
    for settings in ({"solver": "unipc"}, {"text_rule": "progress"}, {"guidance": 1.0}, {"temperature": 0.0}):
        assert bits(engine.joint("a red seven", num_steps=3, seeds=1, **settings)[0]) != bits(one)
    long = "one two three up down left right seven a"  # longer than the text stream, which here is the caption's
    assert engine.joint(long, num_steps=1)[0].prompt == long


def test_text_of_tokens(engine):
    """Ends at the end mark; what the head has more of than the tokenizer reads as unknown."""
    ids = engine.tokenizer.encode("red two")
    assert engine.decode([*ids, *ids]) == "red two" and engine.decode(torch.tensor([25, ids[0]])) == "<unk> red"
    assert engine.decode([*ids, *ids], stop_at_eos=False) == "red two red two"


def test_callback_is_called_after_every_step_of_every_request(engine):
    calls, requests = [], mixed_requests()
    engine.run(requests, callback=lambda *call: calls.append(call))
    extra = [request.text_rule == "progress" for request in requests]  # one more forward at time 0
    for request, more in zip(requests, extra, strict=True):
        total = request.num_steps + more
        assert [call[:2] for call in calls if call[2] is request] == [(i + 1, total) for i in range(total)]
    assert len(calls) == sum(request.num_steps for request in requests) + sum(extra)
    seen = []
    engine.generate("one", num_steps=2, callback=lambda done, total, request: seen.append((done, request)))
    assert [done for done, _ in seen] == [1, 2] and isinstance(seen[0][1].seed, int), "the seed is filled in"


class OtherNull(HashTextEncoder):
    """The same words, another unconditional condition."""

    def null(self):
        return torch.full((1, self.text_dim), 0.7)


@pytest.mark.parametrize("kind", ["generate", "joint"])
def test_guidance_of_one_is_none(kind):
    """The unconditional branch then has no say; with any other guidance it has."""
    model = make_model()
    ours, others = make_engine(model), make_engine(model, text_encoder=OtherNull(16, 9))
    for guidance, same in ((1, True), (1.0, True), (1.5, False)):
        request = Request(kind, "one", seed=1, num_steps=3, guidance=guidance)
        assert torch.equal(alone(ours, request).latent, alone(others, request).latent) == same


def test_caption_of_a_file(engine, tmp_path):
    path = tmp_path / "video.mp4"
    write_video(path, make_video(3), fps=8)
    with pytest.warns(
        UserWarning, match=r"video.mp4: video fitted: 4 frames of 256x256 -> 4 frames of 16x16"
    ) as caught:
        from_file = engine.caption(path, num_steps=3, seeds=1)
    assert [warning.filename for warning in caught] == [__file__]
    fitted, _ = resize_video(read_video(path)[0], SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bits(engine.caption(fitted, num_steps=3, seeds=1)[0]) == bits(from_file[0])
    with pytest.warns(UserWarning, match="video fitted"):
        assert bits(engine.caption([str(path), fitted], num_steps=3, seeds=1)[0]) == bits(from_file[0])


def test_caption_of_another_size(engine):
    large = make_video(4, (6, 24, 40))
    with pytest.warns(UserWarning, match="^video: video fitted: 6 frames of 40x24 -> 4 frames of 16x16$"):
        engine.caption(large, num_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.caption(large, num_steps=1, frames=6, height=24, width=40)


@pytest.mark.parametrize("source", ["uniform", "mask"])
def test_a_saved_engine_comes_back_with_the_same_bits(tmp_path, source):
    saved = make_engine(defaults={"source": source, "fps": 12.0, "jobs": {"caption": {"steps": 3}}})
    saved.save_pretrained(tmp_path / "model")
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["config.json", "engine.json", "model.safetensors", "tokenizer.json"]
    loaded = Engine.from_pretrained(tmp_path / "model")
    assert loaded.defaults == saved.defaults and loaded.defaults.source == source
    requests = mixed_requests()
    assert list(map(bits, loaded.run(requests))) == list(map(bits, saved.run(requests)))
    loaded.save_pretrained(tmp_path / "again")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


class NoConfig(WordTokenizer):
    def to_config(self):
        raise ValueError("made from an object")


def test_parts_that_cannot_be_saved_are_told_before_the_weights_are_written(tmp_path):
    with pytest.raises(ValueError, match="made from an object"):
        make_engine(tokenizer=NoConfig(WORDS)).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_paths_in_the_folder_are_found_and_saved_from_anywhere(tmp_path, monkeypatch):
    """They were relative to the folder that one was in when the engine was loaded."""
    (tmp_path / "model" / "vae").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = _located({"type": "wan_vae", "path": "vae", "other_path": "elsewhere"}, Path("model"))
    assert found == {"type": "wan_vae", "path": str(tmp_path / "model" / "vae"), "other_path": "elsewhere"}


@pytest.mark.parametrize("dtypes", [{"dtype": torch.bfloat16}, {"compute_dtype": torch.bfloat16}], ids=str)
def test_bf16(tmp_path, dtypes):
    """Near fp32, and as independent of the neighbours."""
    full = make_engine()
    full.save_pretrained(tmp_path)
    engine = Engine.from_pretrained(tmp_path, **dtypes)
    assert engine.model.dtype == torch.bfloat16
    assert engine.model.patch_embedding.weight.dtype == dtypes.get("dtype", torch.float32)
    request = Request("generate", "a red seven", seed=1, num_steps=3, guidance=1)
    got, want = alone(engine, request).latent, alone(full, request).latent
    assert got.dtype == torch.float32 and 1e-5 < (got - want).norm() / want.norm() < 0.1
    requests = mixed_requests()
    together = engine.run(requests)
    assert [bits(alone(engine, request)) for request in requests] == list(map(bits, together))


def test_a_source_that_is_not_there_names_the_models_that_are():
    embedded = sorted(path.parent.name for path in sampling.engine.EMBEDDED.glob("*/engine.json"))
    with pytest.raises(ValueError, match=r"source must be a folder with engine.json or one of") as caught:
        Engine.from_pretrained("nope")
    assert f"the package's models ({', '.join(embedded) or 'none'}), got 'nope'" in str(caught.value)
    for name in embedded:
        assert isinstance(Engine.from_pretrained(name), Engine)


def change(name, **values):
    def apply(folder):
        kept = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))

    return apply


BROKEN = [
    ("source must be a folder with engine.json", lambda folder: (folder / "engine.json").unlink()),
    ("tokenizer.json must be a readable json file", lambda folder: (folder / "tokenizer.json").unlink()),
    ("must hold config.json and .*model.safetensors", lambda folder: (folder / "model.safetensors").unlink()),
    ("engine.json must be a readable json file", lambda folder: (folder / "engine.json").write_text("{")),
    ("engine.json must be a readable json file", lambda folder: (folder / "engine.json").write_bytes(b"\xff\xfe")),
    ("engine.json must hold a json object, got list", lambda folder: (folder / "engine.json").write_text("[]")),
    ("engine.json must be a readable json file", lambda folder: (folder / "engine.json").write_text("[" * 100_000)),
    ("engine.json must have format 1, got 2", change("engine.json", format=2)),
    ("engine.json must have format 1, got None", change("engine.json", format=None)),
    ("engine.json must name codec, defaults, .*, got defaults", change("engine.json", codec=None)),
    ("engine.json must hold a json object for each part, got 5", change("engine.json", codec=5)),
    ('codec type must be "pixel" or "wan_vae"', change("engine.json", codec={"type": "jpeg"})),
    ('codec type must be "pixel" or "wan_vae"', change("engine.json", codec={"type": ["pixel"]})),
    ("block must be three positive integers", change("engine.json", codec={"type": "pixel", "block": [2, None, 4]})),
    ("defaults must be a mapping, got 5", change("engine.json", defaults=5)),
    ("text_dim 16 like the model, got 8", change("engine.json", text_encoder={"type": "hash", "text_dim": 8})),
    ("must have the model.s shapes", change("config.json", ffn_dim=50)),
]  # fmt: skip


@pytest.mark.parametrize("match, damage", BROKEN)
def test_a_folder_that_cannot_be_loaded(tmp_path, match, damage):
    make_engine().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=match):
        Engine.from_pretrained(tmp_path)

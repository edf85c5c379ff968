"""The training file: what it takes, and one line that names file, setting, rule and value for what it does not."""

import math
from pathlib import Path

import pytest
import yaml
from tiny_run import TINY, stage, tiny

from uvg_engine.training.config import TrainConfig, differences

DIGITS = Path(__file__).resolve().parents[2] / "configs" / "digits.yaml"
GOOD = {**TINY, "stages": [stage("one"), stage("two", "prompt")]}


def write(folder, values):
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def changed(path, value):
    """GOOD with the value at a path of names and indices replaced."""
    values = yaml.safe_load(yaml.safe_dump(GOOD))
    *way, last = path
    inner = values
    for name in way:
        inner = inner.setdefault(name, {}) if isinstance(inner, dict) else inner[name]
    inner[last] = value
    return values


def test_the_shipped_file_survives_a_round_trip(tmp_path):
    config = TrainConfig.from_yaml(DIGITS)
    assert TrainConfig.from_yaml(write(tmp_path, config.to_dict())) == config
    assert config.total_steps == sum(s.steps for s in config.stages)
    first = config.stages[0].steps
    assert [config.stage_at(s) for s in (0, first - 1, first)] == [(0, 0), (0, first - 1), (1, 0)]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["modle"], {}, "unknown ['modle'], missing []"),
        (["stages", 0, "learning_rate"], 1.0, "stages[0] must name known settings, got unknown ['learning_rate']"),
        (["times", "std"], 1.0, "unknown ['std'], missing []"),
        (["stages"], "video", "stages must be a list, got 'video'"),
        (["stages"], [], "stages must not be empty, got []"),
        (["stages", 0], "video", "stages[0] must be a mapping, got 'video'"),
        (["stages", 1, "name"], "one", "stage names must differ, got ['one', 'one']"),
        (["stages", 0, "text"], "poem", "stage one: text must be one of none, prompt, caption, got 'poem'"),
        (["stages", 0, "steps"], 0, "stage one: steps must be at least 1, got 0"),
        (["stages", 0, "steps"], "many", "stage one: steps must be an integer, got 'many'"),
        (["stages", 0, "steps"], 1.5, "stage one: steps must be an integer, got 1.5"),
        (["stages", 0, "steps"], True, "stage one: steps must be an integer, got True"),
        (["stages", 0, "lr"], 0.0, "stage one: lr must be positive, got 0.0"),
        (["stages", 0, "lr"], "1e-3", "stage one: lr must be a number (write it with a dot, as 1.0e-3), got '1e-3'"),
        (["stages", 0, "lr"], "fast", "stage one: lr must be a number, got 'fast'"),
        (["stages", 0, "lr"], math.nan, "stage one: lr must be a number, got nan"),
        (["stages", 0, "warmup"], -1, "stage one: warmup must not be negative, got -1"),
        (["stages", 0, "schedule"], "step", "stage one: schedule must be one of cosine, constant, got 'step'"),
        (["stages", 0, "final_lr_ratio"], 2.0, "stage one: final_lr_ratio must be in [0, 1], got 2.0"),
        (["stages", 0, "generate"], 0.9, "must be shares that sum to 1 at the most, got (0.9, 0.35, 0.15)"),
        (["stages", 0, "caption"], -0.1, "must be shares that sum to 1 at the most, got (0.3, -0.1, 0.15)"),
        (["stages", 0, "condition_dropout"], 1.1, "stage one: condition_dropout must be in [0, 1], got 1.1"),
        (["stages", 0, "lambda_v"], -1.0, "stage one: lambda_v must not be negative, got -1.0"),
        (["stages", 0, "lambda_t"], -1.0, "stage one: lambda_t must not be negative, got -1.0"),
        (["times", "video_std"], -1.0, "times: video_std must not be negative, got -1.0"),
        (["times", "text_power"], 0.0, "times: text_power must be positive, got 0.0"),
        (["times"], 3, "times must be a mapping, got 3"),
        (["model"], 3, "model must be a name or a mapping of sizes, got 3"),
        (["data"], "digits", "data must be a mapping, got 'digits'"),
        (["codec"], None, "codec must be a mapping, got None"),
        (["text_encoder"], [], "text_encoder must be a mapping, got []"),
        (["tokenizer"], "word", "tokenizer must be a mapping, got 'word'"),
        (["defaults"], 1, "defaults must be a mapping, got 1"),
        (["init"], 1, "init must be null, wan:PATH, published:PATH or pretrained:DIR, got 1"),
        (["seed"], -1, "seed must be in [0, 2**31), got -1"),
        (["seed"], 2**31, "seed must be in [0, 2**31), got 2147483648"),
        (["batch_size"], 0, "batch_size must be a positive multiple of accumulate, got (0, 1)"),
        (["accumulate"], 3, "batch_size must be a positive multiple of accumulate, got (4, 3)"),
        (["text_length"], 0, "text_length must be at least 1, got 0"),
        (["source"], "noise", "source must be uniform or mask, got 'noise'"),
        (["loss"], "mse", "loss must be ce or gkl, got 'mse'"),
        (["dtype"], "float16", "dtype must be float32 or bfloat16, got 'float16'"),
        (["betas"], [0.9], "betas must be two numbers in [0, 1), got (0.9,)"),
        (["betas"], [0.9, 1.0], "betas must be two numbers in [0, 1), got (0.9, 1.0)"),
        (["betas"], [0.9, "x"], "betas must be two numbers in [0, 1), got (0.9, 'x')"),
        (["betas"], 0.9, "betas must be two numbers in [0, 1), got 0.9"),
        (["weight_decay"], -0.1, "weight_decay must not be negative, got -0.1"),
        (["clip_norm"], 0.0, "clip_norm must be positive, got 0.0"),
        (["ema"], 1.0, "ema must be in [0, 1), got 1.0"),
        (["checkpoint_every"], 0, "checkpoint_every must be at least 1, got 0"),
        (["keep_checkpoints"], 0, "keep_checkpoints must be at least 1, got 0"),
        (["log_every"], 0, "log_every must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line_that_names_the_file(tmp_path, path, value, message):
    file = write(tmp_path, changed(path, value))
    with pytest.raises(ValueError) as caught:
        TrainConfig.from_yaml(file)
    told = str(caught.value)
    assert told.startswith(f"{file}: ") and message in told and "\n" not in told


@pytest.mark.parametrize("name", ["model", "stages", "data", "codec", "text_encoder"])
def test_what_has_no_default_must_be_there(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}"):
        TrainConfig.from_yaml(write(tmp_path, {key: value for key, value in GOOD.items() if key != name}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"stages: [", "must be YAML"),
        (b"\xff\xfe\x00\x01", "must be YAML"),
        (b"", "must be a mapping, got NoneType"),
        (b"- 1", "must be a mapping, got list"),
        (b"seed: 1\nmodel: digits\nseed: 2", "must be YAML: found 'seed' a second time .* line 3"),
        (b"stages:\n  - {name: one, lr: 1.0e-3, text: none, lr: 2.0e-3}", "found 'lr' a second time"),
        (b"seed: 2026-13-45", "must be YAML: month must be in 1"),
        (b"{1: 2, no: 3, sed: 4, stages: []}", r"unknown \[1, False, 'sed'\]"),
    ],
)
def test_what_is_no_training_file_is_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "train.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        TrainConfig.from_yaml(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="training file must exist, got"):
        TrainConfig.from_yaml(tmp_path / "other.yaml")


@pytest.mark.parametrize("texts", [("prompt", "none", "caption"), ("none", "prompt", "none", "prompt")])
def test_text_is_not_left_out_in_between(texts):
    with pytest.raises(ValueError, match="the text parts would start anew"):
        tiny(*(stage(f"stage{i}", text) for i, text in enumerate(texts)))


@pytest.mark.parametrize("texts", [("none",), ("prompt", "caption"), ("none", "none", "prompt"), ("prompt", "none")])
def test_other_orders_of_stages_are_fine(texts):
    assert len(tiny(*(stage(f"stage{i}", text) for i, text in enumerate(texts))).stages) == len(texts)


def test_differences_name_each_setting():
    one = tiny().to_dict()
    assert differences(one, tiny().to_dict()) == []
    two = {**one, "seed": 4, "model": {**one["model"], "layers": 3}, "stages": [dict(s) for s in one["stages"]]}
    two["stages"][1]["lr"] = 1.0
    del two["ema"]
    assert differences(one, two) == ["ema", "model.layers", "seed", "stages[1].lr"]
    assert differences(one, {**one, "stages": one["stages"][:1]}) == ["stages"]
    assert differences({"block": (4, 8), 1: 2}, {"block": [4, 8], 1: 2}) == [], "a file has lists where Python may not"
    assert differences({"block": (4, 8), 1: 2}, {"block": [4, 9], "a": 2}) == ["1", "a", "block[1]"]


def test_a_name_may_be_merged_and_said_anew(tmp_path):
    """A merge key is YAML's own way to say a thing twice; what is written beside it counts."""
    first, *_ = stages = [stage("one", lr=1e-3), stage("two", "prompt", lr=2e-3)]
    text = (
        yaml.safe_dump({**TINY})
        + f"stages:\n  - &first {first}\n  - {{<<: *first, name: two, text: prompt, lr: 2.0e-3}}\n"
    )
    (tmp_path / "train.yaml").write_text(text)
    assert TrainConfig.from_yaml(tmp_path / "train.yaml") == tiny(*stages)

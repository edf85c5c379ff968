"""uvg doctor, eval, data export, train, export."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from uvg_engine import backends
from uvg_engine.cli._op_calls import ask
from uvg_engine.training.data.folder import FolderDataset

TRAINING = """
model: {heads: 1, head_dim: 16, text_dim: 16, freq_dim: 16, ffn_dim: 16, layers: 1}
data: {type: digits}
codec: {type: pixel, block: [4, 8, 8], keep: [1, 1, 1]}
text_encoder: {type: hash, text_dim: 16, max_len: 16}
batch_size: 1
text_length: 28
checkpoint_every: 1
stages: [{name: only, text: prompt, steps: 2, lr: 1.0e-3}]
"""


def test_doctor_tells_what_serves_every_op_and_why_not_the_others(uvg):
    ran = uvg("doctor", "--json")
    report = json.loads(ran.out)
    assert ran.code == 0 and set(report["ops"]) == set(backends.table("reference"))
    for op, calls in report["ops"].items():
        assert {("cpu", "float32"), ("cpu", "bfloat16")} <= {(call["device"], call["dtype"]) for call in calls}
        for call in calls:
            assert call["error"] is None, (op, call)
            assert call["served_by"] == next(n for n in backends.names() if n not in call["refused"])
            assert all(reason and reason.strip() for reason in call["refused"].values())
            assert call["why"].endswith(f"served by {call['served_by']}")
    assert report["machine"]["cores"] >= 1 and report["torch"]["threads"] >= 1
    assert report["native"]["description"] and report["packages"]["av"]


def test_doctor_for_people(uvg, monkeypatch):
    monkeypatch.setenv("UVG_BACKENDS", "reference")
    ran = uvg("doctor")
    lines = ran.out.splitlines()
    assert ran.code == 0 and ran.err == "" and "UVG_BACKENDS=reference" in ran.out
    for op in backends.table("reference"):
        assert [line.split()[1::2] for line in lines if f" {op} " in line and "reference" in line], op
    for name in set(backends.ORDER) - {"reference"}:
        assert f"{name}: left out by UVG_BACKENDS" in lines


def test_doctor_tells_of_models_and_what_is_wrong_with_them(uvg, model, monkeypatch):
    shutil.copytree(model, "models/sound")
    shutil.copytree(model, "models/cut")
    Path("models/cut/engine.json").write_text("{")
    monkeypatch.setattr("uvg_engine.sampling.engine.EMBEDDED", Path("models").resolve())
    cut, sound = json.loads(uvg("doctor", "--json").out)["models"]
    size = sum(path.stat().st_size for path in Path(model).iterdir())
    assert (sound["name"], sound["clip"], sound["bytes"]) == ("sound", [8, 32, 32], size) and "error" not in sound
    assert cut["name"] == "cut" and cut["error"] and "clip" not in cut
    assert uvg("doctor").code == 0


def test_doctor_tells_of_a_wrong_setting(uvg, monkeypatch):
    monkeypatch.setenv("UVG_BACKENDS", "abacus")
    ran = uvg("doctor")
    assert ran.code == 2 and ran.err.startswith("error: UVG_BACKENDS must list") and ran.err.count("\n") == 1


def test_doctor_asks_only_about_ops():
    with pytest.raises(ValueError, match=r"op must be one of .*, got 'nonsense'"):
        ask("nonsense", "cpu", None)


def test_eval_prints_exactly_the_document(uvg, model):
    line = ("eval", "--model", model, "--limit", 3, "--json")
    ran = uvg(*line)
    report = json.loads(ran.out)
    assert ran.code == 0 and ran.err == ""
    assert {job: list(shares) if isinstance(shares, dict) else shares for job, shares in report.items()} == {
        "caption": ["digit", "color", "direction", "speed", "all"],
        "generate": ["digit", "color", "direction"],
        "joint": ["agreement"],
        "n": 3,
    }
    shares = [share for job in ("caption", "generate", "joint") for share in report[job].values()]
    assert all(0 <= share <= 1 for share in shares)
    assert uvg(*line, "--batch", 2).out == ran.out


def test_progress_goes_to_stderr(uvg, model, monkeypatch):
    monkeypatch.setattr("uvg_engine.cli._progress._LINE_EVERY", 0.0)
    ran = uvg("eval", "--model", model, "--limit", 2, "--steps", 3, "--json")
    assert json.loads(ran.out)["n"] == 2
    assert ran.progress == tuple(f"{job}: {i}/6 steps" for job in ("caption", "generate", "joint") for i in range(1, 7))


def test_eval_for_people(uvg, model):
    ran = uvg("eval", "--model", model, "--limit", 2, "--steps", 1, "--guidance", 1)
    assert ran.code == 0 and f"{model} on 2 held-out clips" in " ".join(ran.out.split())
    for row in ("caption: text against clip", "these four at once", "digit, color, direction agree", "bounces"):
        assert row in ran.out
    assert max(map(len, ran.out.splitlines()[2:])) <= 80


def test_eval_of_a_model_of_another_world(uvg, model):
    ran = uvg("eval", "--model", model, "--seed", 1 << 43, "--limit", 1)
    assert ran.code == 2 and ran.err.startswith("error: seed must be an integer from 0 to") and ran.err.count("\n") == 1


def test_data_export(uvg):
    ran = uvg("data", "export", "-o", "clips", "--count", 3, "--split", "heldout", "--seed", 2, "--json")
    told = json.loads(ran.out)
    assert ran.code == 0 and told["folder"] == "clips" and told["count"] == 3 and told["split"] == "heldout"
    assert len(FolderDataset("clips")) == 3 and len(list(Path("clips").glob("*.mp4"))) == 3
    again = uvg("data", "export", "-o", "clips", "--count", 3)
    assert again.code == 2 and again.err == "error: out_dir must be a new or empty folder, got clips\n"


@pytest.mark.parametrize("option", ["--split nope", "--combinations nope", "--scale 0", "--split heldout --augment"])
def test_data_export_mistakes(uvg, option):
    ran = uvg("data", "export", "-o", "clips", "--count", 1, *option.split())
    assert ran.code == 2 and ran.err.startswith("error: ") and ran.err.count("\n") == 1 and os.listdir() == []


def test_train_stop_resume_export_and_use(uvg):
    Path("tiny.yaml").write_text(TRAINING)
    line = ("train", "-c", "tiny.yaml", "-o", "run", "--json")
    first = json.loads(uvg(*line, "--stop-at", 1).out)
    assert first == {"model": "run/model", "step": 1, "total_steps": 2}
    assert json.loads(uvg(*line, "--resume").out)["step"] == 2
    exported = json.loads(uvg("export", "run", "-o", "mine", "--json").out)
    assert exported["model"] == "mine" and exported["ema"] is True and "2.pt" in exported["checkpoint"]
    assert uvg("generate", "a red one", "-o", "a.mp4", "--model", "mine", "--steps", 1).code == 0
    assert uvg("caption", "a.mp4", "--model", "run/model", "--steps", 1).code == 0
    assert uvg(*line).code == 2  # the folder holds a run


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train -c none.yaml -o run", "none.yaml"),
        ("train -c bad.yaml -o run", "bad.yaml"),
        ("export nowhere -o mine", "nowhere"),
        ("export . -o mine", "checkpoint"),
    ],
)
def test_train_and_export_mistakes(uvg, line, told):
    Path("bad.yaml").write_text("model: [")
    ran = uvg(*line.split())
    assert ran.code == 2 and ran.err.startswith("error: ") and ran.err.count("\n") == 1 and told in ran.err
    assert os.listdir() == ["bad.yaml"]


def test_doctor_tells_of_another_order_on_a_gpu():
    from uvg_engine.cli.doctor import _orders

    usual = {"device": "cpu", "dtype": "bfloat16", "why": "asked: cuda, reference\nbecause: usual\nserved by reference"}
    swapped = usual | {"device": "cuda", "why": "asked: reference, cuda\nbecause: short\nserved by reference"}
    failed = usual | {"why": ""}
    report = {"backends": {"order": ["cuda", "reference"]}, "ops": {"flash_attention": [usual, swapped, failed]}}
    assert _orders(report) == ["flash_attention (bfloat16 on cuda): asked: reference, cuda; because: short"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's orders are told")
def test_doctor_tells_of_no_order_where_there_is_but_the_usual_one(uvg):
    """On the CPU a line for each op said that the backends of GPUs are not asked."""
    ran = uvg("doctor")
    assert ran.code == 0 and "flash_attention" in ran.out and "because" not in ran.out

"""The throughput scripts time what they say, of two ways that give the same results."""

import gc
import json
import tempfile
import time
from types import SimpleNamespace

import pytest
import torch
import yaml

from bench import throughput


@pytest.mark.parametrize("model", ["digits", "1.3b"])
@pytest.mark.parametrize("job", ["generate", "train"])
def test_throughput_tells_of_what_was_run(job, model, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "make", lambda *given: lambda: time.sleep(1e-3) or [])
    monkeypatch.setattr(throughput, "alone", lambda *given: 3.0)
    given = f"--model {model} --layers 5 --samples 2 --steps 3 --seconds 0".split()
    assert throughput.main(job, [*given, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["backend"] for line in lines] == ["uvg", "reference"]
    digits = job == "train" or model == "digits"  # training takes the clips of digits
    for line in lines:
        assert line["tokens_per_second"] * line["ms"] / 1e3 == pytest.approx(2 * 3 * (64 + 28 if digits else 1280 + 64))
        assert line["shape"].startswith("2 x 8x32x32, 3 steps" if digits else "2 x 8x128x160, 3 steps")
        assert ("5 layers" in line["shape"]) == (model == "1.3b")
    throughput.main(job, given)
    about, ours, plain = capsys.readouterr().out.splitlines()
    assert "torch" in about and "samples/s" in ours and "x reference" in ours and "tokens/s" in plain


@pytest.mark.parametrize(
    "given, dtype", [("digits", "float32"), ("1.3b", "bfloat16"), ("1.3b --dtype fp32", "float32")]
)
def test_throughput_multiplies_in_the_dtype_it_tells(given, dtype, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(throughput, "make", lambda *given: made.append(given) or (lambda: time.sleep(1e-3) or []))
    monkeypatch.setattr(throughput, "alone", lambda *given: made.append(given) or 3.0)
    throughput.main("train", f"--model {given} --seconds 0 --json".split())
    assert [json.loads(line)["dtype"] for line in capsys.readouterr().out.splitlines()] == [dtype, dtype]
    assert len(made) == 4 and {one[-1] for one in made} == {dtype}


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("given", ["digits", "1.3b", "1.3b --dtype fp32", "digits --dtype bf16"])
def test_throughput_says_before_it_waits_that_bf16_is_slow_here(given, supported, monkeypatch, capsys):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(throughput, "lines", lambda *given: iter(()))
    throughput.main("train", f"--model {given} --json".split())
    slow = not supported and given in ("1.3b", "digits --dtype bf16")
    assert ("no bf16 instructions here" in capsys.readouterr().err) == slow


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_timed_multiplies_as_asked_and_leaves_no_folder(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    call = throughput.training("digits", 2, 2, 1, dtype)
    (folder,) = tmp_path.glob("uvg-bench-*")  # torch may make others
    assert yaml.safe_load((folder / "config.yaml").read_text())["dtype"] == dtype
    del call
    gc.collect()
    assert list(tmp_path.glob("uvg-bench-*")) == []
    seen = []
    monkeypatch.setattr(throughput, "Engine", SimpleNamespace(from_pretrained=lambda *_, **given: seen.append(given)))
    throughput.sampling("joint", "digits", 2, 1, 1, dtype, False)
    assert [given["compute_dtype"] for given in seen] == [getattr(torch, dtype)]


@pytest.mark.parametrize("job", ["generate", "caption", "joint", "train"])
def test_the_two_ways_give_the_same(job, threads_restored):
    torch.set_num_threads(1)
    values = [throughput._values(throughput.make(way, job, "digits", 2, 2, 3, "float32")()) for way in throughput.WAYS]
    assert len(values[0]) == (2 if job == "joint" else 1) and all(len(each) for each in values[0])
    assert throughput.difference(*values, throughput.SLACK["float32"], throughput.AGREE["float32"]) == ""


def test_ways_that_differ_are_told_and_not_timed(monkeypatch, capsys):
    made = {way: [SimpleNamespace(latent=torch.full((4,), value))] for way, value in (("uvg", 1.1), ("reference", 1.0))}
    monkeypatch.setattr(throughput, "make", lambda way, *given: lambda: time.sleep(1e-3) or made[way])
    monkeypatch.setattr(throughput, "alone", lambda *given: 3.0)
    assert throughput.main("generate", ["--seconds", "0"]) == 1
    _, ours, plain = capsys.readouterr().out.splitlines()
    assert "wrong: output 0 differs from the reference by 0.1" in ours and "samples/s" not in ours
    assert "samples/s" in plain

"""The bench times the right thing: every op and peer agrees with the reference, and every line says what it is."""

import dataclasses
import json
import sys
import time

import pytest
import torch

from bench import block, gpu_check, gpu_peers, report, throughput
from bench.__main__ import main
from bench.case import SIZES
from bench.one_case import OPS, Options, bench_case, cases, difference
from bench.ops import window_attention
from bench.peers import PEERS
from bench.record import RESULTS, THROUGHPUT
from bench.timing import Clock, Roof, Timing, within
from uvg_engine import backends

NAN, INF = float("nan"), float("inf")
CLOCK = Clock(seconds=0.0, min_rounds=2)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another on a busy machine would take minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lines_of(op, **how):
    """All cases of an op, on the embedded model's sizes; inductor's compiler would take minutes."""
    roof = Roof(CLOCK)
    roof.of = lambda dtype: {"gflops": 1.0, "gbs": 1.0}
    options = Options(left_out=("inductor",), **how)
    return [line for case in cases(op) for line in bench_case(op, case, "digits", torch.float32, roof, options)]


@pytest.mark.parametrize("op", OPS)
def test_every_backend_and_peer_is_timed(op):
    lines = lines_of(op)
    assert [line for line in lines if "wrong" in line] == []
    timed = {line["backend"] for line in lines if line["pass"] == "forward" and "ms" in line}
    refused = {line["backend"] for line in lines if "refused" in line}
    serving = {name for name in backends.names() if op in backends.table(name)}
    assert serving <= timed | refused and "reference" in timed
    peers = timed - serving
    assert peers, "an op without a peer"
    times = [line for line in lines if "ms" in line]
    for line in times:
        beside = {other["backend"] for other in times if (other["case"], other["pass"]) == (line["case"], line["pass"])}
        if line["backend"] in serving:
            assert set(line["times_faster"]) >= beside - serving


@pytest.mark.parametrize("there", [True, False])
def test_a_block_is_timed_beside_its_peers(there, monkeypatch):
    """Also where diffusers, which tells the truth of Wan's block, is not installed."""
    if there:
        pytest.importorskip("diffusers")
    else:
        monkeypatch.setitem(PEERS, "diffusers", dataclasses.replace(PEERS["diffusers"], missing=lambda device: "away"))
        monkeypatch.setitem(sys.modules, "diffusers.models.transformers.transformer_wan", None)
    lines = lines_of("block", passes=("forward", "forward+backward"))
    assert [line for line in lines if "wrong" in line] == []
    timed = {(line["case"], line["pass"], line["backend"]) for line in lines if "ms" in line}
    for case, peer in ("with text", "torch"), ("as Wan", "diffusers"):
        for what in "forward", "forward+backward":
            assert (case, what, "uvg") in timed and ((case, what, peer) in timed) == (there or peer == "torch")


@pytest.mark.parametrize("op", OPS)
def test_the_truth_is_there_on_a_gpu(op):
    """At the size of gpu_check.sh, a backend of ours that tells the truth is one that serves CUDA tensors."""
    truths = {case.truth(SIZES[gpu_check.SIZE], "cuda") for case in cases(op)}
    assert truths <= {"reference", *PEERS}


@pytest.mark.parametrize("op", OPS)
def test_torch_compile_is_a_peer_of_every_op(op):
    """Of the code that is the peer "torch", which comes first."""
    for case in cases(op):
        assert "inductor" in case.compiled_by and next(iter(case.peers)) == "torch"


def test_flex_attention_sees_what_the_window_does(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    size = SIZES["digits"]
    made = [x.detach() for x in window_attention.make(size, torch.float32)]
    dense = window_attention.torch_peer(size, *made)
    flex = gpu_peers.flex_peer(dense, window_attention.sees(*made[3:]))
    torch.testing.assert_close(flex.function(*flex.inputs), dense.function(*dense.inputs))


def test_a_peer_that_takes_too_long_is_left():
    def stubborn():
        while True:
            try:
                time.sleep(1)
            except Exception:  # as compilers catch what fails inside
                pass

    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not ready after 0\.2 s"), within(0.2):
        stubborn()
    with within(5):
        pass
    with within(None):
        pass
    assert time.monotonic() - begun < 5


def test_a_late_peer_is_a_line_without_a_time(monkeypatch):
    def slow(peer, what):
        time.sleep(5)

    monkeypatch.setitem(PEERS, "torch", dataclasses.replace(PEERS["torch"], adapt=slow))
    lines = lines_of("moe_combine", only=("torch", "reference"), passes=("forward",), peer_lasts=0.2)
    (line,) = [line for line in lines if line["backend"] == "torch"]
    assert line["missing"] == "TimeoutError: not ready after 0.2 s" and len(lines) == 2


def test_a_wrong_result_is_told_and_not_timed(monkeypatch):
    honest = backends.table("reference")["moe_route"]

    def forward(*args):
        weights, experts = honest.forward(*args)
        return 1.01 * weights, experts

    monkeypatch.setitem(backends.table("sdpa"), "moe_route", backends.Kernel(forward, honest.backward))
    lines = lines_of("moe_route")
    wrong = [line for line in lines if "wrong" in line]
    assert {(line["backend"], line["pass"]) for line in wrong} == {("sdpa", "forward"), ("sdpa", "forward+backward")}
    assert all("ms" not in line for line in wrong)


@pytest.mark.parametrize("record", [False, True])
def test_a_wrong_result_fails_the_run(monkeypatch, record, capsys):
    line = {"op": "linear", "shape": "", "dtype": "float32", "pass": "forward", "backend": "cpu"}
    seen = []
    monkeypatch.setattr("bench.__main__.record", lambda run, told, *rest: seen.extend(told(run([]))))
    for more, code in (({"missing": "no"}, 0), ({"wrong": "by 2"}, 1)):
        monkeypatch.setattr("bench.__main__._lines", lambda args, more=more: iter([line | more]))
        assert main(["--record"] * record) == code
    assert "wrong: by 2" in capsys.readouterr().out and len(seen) == 2 * record


@pytest.mark.parametrize(
    "got, truth, wrong",
    [
        ([1.0, INF], [1.0, INF], ""),
        ([-INF, -INF], [-INF, -INF], ""),
        ([], [], ""),
        ([1.0, 2.0], [1.0, 2.0001], ""),
        ([1.0, 2.0], [1.0, 2.1], "by 0.1"),
        ([1.0, 5.0], [1.0, INF], "where that is infinite"),
        ([1.0, -INF], [1.0, INF], "where that is infinite"),
        ([1.0, NAN], [1.0, -INF], "where that is infinite"),
        ([1.0, NAN], [1.0, 2.0], "by nan"),
        ([INF, 2.0], [1.0, 2.0], "by inf"),
    ],
)
def test_what_is_a_difference(got, truth, wrong):
    told = difference((torch.tensor(got),), (torch.tensor(truth),), 1e-4, 1.0)
    assert wrong in told and bool(told) == bool(wrong)


def test_lines_say_where_and_how(capsys):
    assert main(["--quick", "--json", "--dtype", "bf16", "moe_combine"]) == 0
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert {line["backend"] for line in lines} >= {"reference", "torch"}
    for line in lines:
        assert {"op", "shape", "dtype", "backend", "device", "threads", "torch", "commit"} <= set(line)


def test_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["flash_atention"])
    assert "flash_atention" in capsys.readouterr().err


def test_contenders_take_turns():
    calls = []

    def slow(name):
        calls.append(name)
        time.sleep(0.003)  # longer than a sample, so that each turn is one call

    timings = Clock(seconds=0.0, min_rounds=4).alternate({name: lambda name=name: slow(name) for name in "ab"})
    assert all(len(timing.rounds) == 4 for timing in timings.values())
    assert calls[-8:] == list("abbaabba")


def test_ratio_is_that_of_the_rounds():
    slow_then_quick = Timing((4.0, 1.0, 1.0)), Timing((8.0, 2.0, 3.0))
    assert slow_then_quick[0].times_faster_than(slow_then_quick[1]) == 2.0


def test_a_peer_that_cannot_is_a_line_without_a_time(monkeypatch):
    def broken(peer, what):
        raise RuntimeError("not this dtype")

    monkeypatch.setitem(PEERS, "torch", dataclasses.replace(PEERS["torch"], adapt=broken))
    (line,) = [line for line in lines_of("moe_combine") if line["backend"] == "torch" and line["pass"] == "forward"]
    assert "not this dtype" in line["missing"] and "ms" not in line


def test_a_record_becomes_a_page_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "DOCS", tmp_path)
    (tmp_path / "images").mkdir()
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n")
    line = {"op": "flash_attention", "case": "self", "shape": "B=1 L=1024 N=1 H=64", "dtype": "bfloat16"}
    line |= {"pass": "forward", "backend": "cpu", "ms": 2.0, "spread": 0.01, "gflops": 90.0, "gbs": 1.0}
    line |= {"of_roof": 0.9, "roof": {"gflops": 100.0, "gbs": 10.0}, "times_faster": {"torch": 1.5}, "threads": 1}
    missing = {**{n: line[n] for n in ("op", "case", "shape", "dtype", "pass")}, "backend": "openvino", "missing": "no"}
    small = line | {"op": "linear", "dtype": "float32"}
    record = tmp_path / "run.jsonl"
    lines = (small | {"commit": "a"}, line | {"commit": "b"}, missing, line | {"case": "cross", "commit": "b"})
    record.write_text("\n".join(map(json.dumps, lines)))
    drawn = []
    monkeypatch.setattr(report, "bars", drawn.extend)
    made = {path.name for path in report.write(record, "page")}
    assert made == {"page.md", "page_roofline.png", "page_lengths.png"}
    assert {each["dtype"] for each in drawn} == {"bfloat16"}  # as most lines
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "90 GFLOP/s | 90% | torch 1.50" in text and "missing: no" in text and "threads 1, commit a and b." in text


@pytest.mark.parametrize("given", ["", "--dtype fp32", "benchmarks_avx2 --dtype fp32"])
def test_a_record_is_of_one_dtype_and_the_embedded_models_calls(given, tmp_path, monkeypatch):
    seen, written = [], []
    monkeypatch.setattr("bench.__main__._lines", lambda args: seen.append(args) or iter([vars(args)]))
    monkeypatch.setattr("bench.__main__._text", str)
    monkeypatch.setattr("bench.record.RESULTS", tmp_path)
    monkeypatch.setattr(throughput, "lines", lambda *given: iter([{"job": given[0]}]))
    monkeypatch.setattr(report, "write", lambda *given: written.append(given))
    assert main(["--record", *given.split()]) == 0
    runs = [str((each.what, each.size, each.passes, each.dtype)) for each in seen]
    assert len(runs) == len(set(runs))
    assert [each.dtype for each in seen if each.size == ["digits-1"]] == [["fp32"]]
    others = sum(each.dtype == ["fp32"] for each in seen) - 1
    assert others == (len(seen) - 1 if given else 2)
    ((file, page),) = written
    assert page == ("benchmarks_avx2" if "avx2" in given else "benchmarks")
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == len(seen) + len(THROUGHPUT)

    with pytest.raises(SystemExit, match=f"a record of today: go on with --resume {file}"):
        main(["--record", *given.split()])
    for other in ({"benchmarks", "benchmarks_avx2"} - {page}).pop(), f"{page} --dtype {'bf16' if given else 'fp32'}":
        with pytest.raises(SystemExit, match=r"--resume: (a file of|no run of this record)"):
            main(["--record", *other.split(), "--resume", str(file)])
    file.write_text("".join(lines[:5] + lines[7:]))  # as if two runs had not been done
    seen.clear()
    assert main(["--record", *given.split(), "--resume", str(file)]) == 0
    assert len(seen) == 2 and sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)
    for damage, told in (('"threads": ', '"threads": 1'), "threads must be 1"), (("}", ""), "one JSON object a line"):
        file.write_text(lines[0].replace(*damage))
        with pytest.raises(SystemExit, match=told):
            main(["--record", *given.split(), "--resume", str(file)])


def test_a_run_that_is_ended_leaves_none_of_its_lines(tmp_path, monkeypatch):
    def ended(args):
        yield {"op": "first of two"}
        raise KeyboardInterrupt

    runs = iter([lambda args: iter([{"op": "whole"}]), ended])
    monkeypatch.setattr("bench.__main__._lines", lambda args: next(runs)(args))
    monkeypatch.setattr("bench.__main__._text", str)
    monkeypatch.setattr("bench.record.RESULTS", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        main(["--record"])
    (file,) = tmp_path.iterdir()
    assert [json.loads(line)["op"] for line in file.read_text().splitlines()] == ["whole"]


@pytest.mark.parametrize(
    "given, told",
    [
        ("linears", "nothing here is called linears; have flash_attention, "),
        ("linear --only torhc", "--only: no backend or peer is called torhc; have "),
        ("linear --size L77", "invalid choice: 'L77' (choose from "),
        ("linear --threads 0", "argument --threads: invalid positive value: '0'"),
        ("linear --cpu-time", "--cpu-time needs --threads 1"),
        ("--resume bench", "--resume needs --record and a file of results, got bench"),
        ("--record --resume none.jsonl", "--resume needs --record and a file of results, got none.jsonl"),
        ("linear --record", "--record has runs of its own, on the CPU: leave out linear"),
        ("--record --device cuda --pass forward", "leave out --device, --pass"),
        ("--record --dtype fp32 --dtype bf16", "--record takes one --dtype, got fp32 and bf16"),
        ("linear --memory --device cuda", "--memory is measured on the CPU only, got --device cuda"),
        ("linear --peer-seconds 0", "--peer-seconds must be more than 0"),
        ("linear --seconds -1", "argument --seconds: invalid duration value: '-1'"),
    ],
)
def test_mistakes_on_the_command_line_are_told(given, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main(given.split())
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_nothing_timed_is_told(capsys):
    assert main("linear --only uvg --size digits --dtype fp32".split()) == 2  # a block's name for what is ours
    assert "nothing was timed" in capsys.readouterr().err


def test_a_report_is_of_a_file_that_is_there(capsys):
    with pytest.raises(SystemExit):
        report.main(["none.jsonl"])
    assert "no such file: none.jsonl" in capsys.readouterr().err
    pages = {path.name: report.page_of(path) for path in RESULTS.glob("*.jsonl")}
    assert pages and all(page == f"benchmarks{'_avx2' * ('-avx2.' in name)}" for name, page in pages.items())


def test_a_contender_that_is_refused_may_be_the_only_one(capsys):
    assert main("moe_route --only triton --size digits --dtype fp32 --pass forward --seconds 0".split()) == 0
    assert "refused: moe_route is not served here: triton: tensors are on cpu" in capsys.readouterr().out


def test_a_block_asks_the_host_for_nothing_in_a_call(monkeypatch):
    """Tables made on the host wait for a device that is at work: made once, as a model makes them once a batch. A
    gradient is wanted of them after the forwards of inference mode."""
    made = []
    build = block.Layout.build
    monkeypatch.setattr(block.Layout, "build", lambda *args, **more: made.append(more) or build(*args, **more))
    ours, h, condition, modulation, *weights = block.make(SIZES["digits"], torch.float32, False)
    with torch.inference_mode():
        first = ours(h, condition, modulation, *weights)
    again = ours(h, condition, modulation, *weights)
    assert torch.equal(first, again) and len(made) == 1
    torch.autograd.grad(again.sum(), weights, allow_unused=True)
    ours.to("meta")
    there = ours(*(x.to("meta") for x in (h, condition, modulation)))
    assert there.is_meta and len(made) == 2

"""bench/gpu_check.sh without a GPU: what it starts, in which order and for how long, and what it tells."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_check, gpu_variants, timing
from uvg_engine import backends


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_gpu_check_fails_without_a_gpu(capsys):
    assert gpu_check.main([]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False and "no CUDA device" in told["reason"]


def test_gpu_check_counts_what_pytest_reports():
    report = """<testsuites><testsuite tests="4">
      <testcase classname="a" name="good"/><testcase classname="a" name="left"><skipped message="no"/></testcase>
      <testcase classname="a" name="bad"><failure message="error 3&#10;more">trace</failure></testcase>
      <testcase classname="a" name="worse"><error message="at setup">trace</error></testcase>
    </testsuite></testsuites>"""
    assert gpu_check.counted(report) == {
        "passed": 1,
        "skipped": 1,
        "failures": ["a::bad: ['error 3']", "a::worse: ['at setup']"],
    }


def test_gpu_report_tells_what_is_missing_and_what_failed():
    timed = {"op": "moe_mlp", "shape": "T=1", "pass": "forward", "backend": "triton", "ms": 1.5, "of_roof": 0.5}
    lost = {"op": "moe_mlp", "shape": "T=1", "pass": "forward", "backend": "liger", "missing": "not installed"}
    found = {
        **{"ok": False, "machine": {"device": "H100"}, "backends": {"triton": "moe_mlp"}, "not asked": "exit 124: []"},
        **{"peers": {"liger": "not installed", "torch": "available"}, "not timed": {"block": "exit 1: ['boom']"}},
        **{"tests": {"passed": 3, "skipped": 1, "failures": ["a::b: ['error']"], "not done": ["c: not begun"]}},
        **{"bench": [timed | {"times_faster": {"torch": 2.0}}, lost], "broken": "OSError: no space"},
    }
    lines = gpu_check.report(found).splitlines()
    for line in (
        *(
            "All well: no.",
            "The check itself did not end well: OSError: no space",
            "- not asked: exit 124: []",
            "- `liger`: not available: not installed",
            "- `torch`: available",
        ),
        *(
            "3 passed, 1 skipped, 1 failed.",
            "- a::b: ['error']",
            "- not done: c: not begun",
            "- block: not timed, exit 1: ['boom']",
        ),
        "| moe_mlp | T=1 | forward | triton | 1.500 | 50% | torch 2.00 |",
        "| moe_mlp | T=1 | forward | liger | - | - | not available: not installed |",
    ):
        assert line in lines


@pytest.mark.slow
def test_gpu_check_gives_every_test_on_a_gpu_to_one_shard():
    """Collected as on a machine with a GPU; the modules that ask for a real one are looked up by name."""
    tests = [path for path in Path(__file__).parent.rglob("test_*.py") if path != Path(__file__)]
    files = {Path(part).name for what in gpu_check.shards().values() for part in what if part.endswith(".py")}
    assert {path.name for path in tests if "pytest.mark.gpu" in path.read_text()} <= files
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests/ops"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["UVG_TEST_DEVICE"] = "cuda"
    told = subprocess.run(command, cwd=gpu_check.ROOT, env=environment, capture_output=True, text=True, check=True)
    found = [line for line in told.stdout.splitlines() if "::" in line and not line.startswith("SKIPPED")]
    assert len(found) > 3000
    for test in found:
        (shard,) = gpu_variants.shards_of(test)
        assert shard in gpu_check.shards(), test


def test_gpu_check_does_not_begin_what_cannot_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "_begun", lambda *given, **more: pytest.fail("was begun"))
    found = gpu_check.shard("linear, cases", [], tmp_path, time.monotonic())
    assert found["not done"] == ["linear, cases: not begun, the time for tests was over"] and found["failures"] == []


def test_gpu_check_ends_in_time():
    """What a process leaves behind, its output's pipe in hand, ends with it."""
    late = "import os, time; print('begun', flush=True); os.fork(); time.sleep(30)"
    begun = time.monotonic()
    assert gpu_check._python(2, "-c", late) == (124, "begun\n")
    assert time.monotonic() - begun < 20


def test_gpu_check_does_not_wait_for_what_cannot_be_ended():
    """A process of another session keeps the pipe, as compilers may; so does one that hangs in a driver."""
    stays = "import os, time; print('begun', flush=True); os.fork() or os.setsid(); time.sleep(90)"
    begun = time.monotonic()
    assert gpu_check._python(3, "-c", stays) == (124, "begun\n")
    assert time.monotonic() - begun < 60


def test_gpu_check_counts_what_a_late_shard_found(tmp_path):
    """Here the last of its tests hangs."""
    tests = tmp_path / "test_late.py"
    tests.write_text(
        "import pytest, time\npytestmark = pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): assert False\n"
        f"def test_c():\n    open({str(tmp_path / 'reached')!r}, 'w').close()\n    time.sleep(600)\n"
    )
    found = gpu_check.shard("late", [str(tests)], tmp_path, time.monotonic() + 20)
    assert (tmp_path / "reached").exists()
    (failure,) = found["failures"]  # pytest puts folders before it where it takes another one for its root
    assert found["passed"] == 1 and failure.split(": ")[0].endswith("test_late::test_b")
    assert found["not done"] == ["late: not ended after 14 s"]


def test_gpu_check_asks_who_serves_in_a_process_that_may_break(monkeypatch):
    def answers(code, told):
        monkeypatch.setattr(gpu_check, "_python", lambda seconds, *command, environment: (code, told))
        return gpu_check.ask("--served", time.monotonic() + 9)

    assert answers(0, 'a warning\n{"triton": "linear"}\n') == ({"triton": "linear"}, "")
    assert answers(0, '{"triton": "lin') == ({}, 'served: exit 0: [\'{"triton": "lin\']')
    assert answers(124, "begun\n") == ({}, "served: exit 124: ['begun']")
    assert answers(1, "") == ({}, "served: exit 1: []")
    assert gpu_check.ask("--served", time.monotonic()) == ({}, "the time for it was over")


def test_a_commit_is_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert timing._commit() == "unknown"


def test_gpu_check_gives_a_timing_its_turn():
    process = gpu_check._begun("-c", "print(input(), flush=True); raise SystemExit(3)")
    assert gpu_check._ended(process, 60, "go\n") == (3, "go\n")


def test_gpu_check_has_time_for_nothing():
    lines, missing = gpu_check.run_bench(time.monotonic())
    assert lines == [] and set(missing) == {*backends.table("triton"), "block"}


@pytest.mark.parametrize("spent, most", [(0, 257), (250, 120), (350, 65)])
def test_gpu_check_with_a_faked_device(monkeypatch, tmp_path, capsys, spent, most):
    """All of it but the device: shards of tests, one of them late, lines of timings, what serves, the report. most:
    seconds for the tests, after `spent` ones of building."""

    warmed, threads = set(), []

    def ended(process, seconds, word=None, grace=0):
        arguments, environment = process
        assert 0 < seconds <= most
        if arguments[1] == "bench.gpu_check":
            return 0, json.dumps(gpu_check.about() if "--about" in arguments else gpu_check.served())
        if arguments[1] == "bench" and word is None:
            warmed.add(arguments[2])
            return 1, "a peer ran out of memory"
        if arguments[1] == "bench":
            assert "--wait" in arguments and word == "go\n"
            line = {"op": arguments[2], "shape": "T=1", "pass": "forward", "backend": "triton", "times_faster": {}}
            return 0, json.dumps(line | {"ms": 1.0, "of_roof": 0.5})
        threads.append(environment["OMP_NUM_THREADS"])
        given = next(text for text in arguments if text.startswith("--junitxml="))
        if "[linear-" in arguments:
            return 124, ""
        Path(given.removeprefix("--junitxml=")).write_text(
            '<testsuite tests="1"><testcase classname="t" name="x"/></testsuite>'
        )
        return 0, ""

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "H100/80 GB")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    refusals = {"cuda": "uvg_engine._cuda is not built"}
    monkeypatch.setattr(gpu_check._op_calls, "ask", lambda *call: {"error": None, "refused": refusals})
    monkeypatch.setattr(gpu_check, "_begun", lambda *arguments, environment=None: (arguments, environment))
    monkeypatch.setattr(gpu_check, "_ended", ended)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check, "limits", dict)
    monkeypatch.delenv("UVG_BACKENDS", raising=False)
    assert gpu_check.main(["--spent", str(spent)]) == 1
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("gpu_H100_80_GB_") and json.loads(capsys.readouterr().out)["ok"] is False
    told = path.read_text()
    assert "- not done: linear, cases: not ended after" in told and f"{len(gpu_check.shards()) - 1} passed" in told
    assert warmed == set(gpu_check.timed()) and set(threads) == {"1"}
    assert "- `cuda`: not available: uvg_engine._cuda is not built" in told and "- `triton`: flash_attention, " in told
    assert (
        "| flash_attention | T=1 | forward | triton | 1.000 | 50% |" in told and "- `openvino`: not available" in told
    )


DEVICE = {"device": "H100", "torch": "torch", "machine": {"commit": "abc"}, "peers": {"liger": "available"}}


def ended_early(monkeypatch, tmp_path, capsys, *arguments):
    """The report of a check in which nothing goes well."""
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    assert gpu_check.main(arguments) == 1
    (path,) = tmp_path.iterdir()
    assert json.loads(capsys.readouterr().out)["ok"] is False
    return path.read_text()


def all_left_out(told):
    """Every shard and every timing by its name."""
    assert all(f"- not done: {name}: not begun" in told for name in gpu_check.shards())
    assert all(f"- {op}: not timed, " in told for op in gpu_check.timed())
    return True


def test_gpu_check_reports_where_the_device_hangs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "ABOUT_LASTS", 2)
    monkeypatch.setattr(gpu_check, "_begun", stand_in("import time; time.sleep(90)"))
    told = ended_early(monkeypatch, tmp_path, capsys)
    assert "The check itself did not end well: about: exit 124: []" in told and all_left_out(told)


def test_gpu_check_reports_where_a_part_breaks(monkeypatch, tmp_path, capsys):
    def broken(*given, **more):
        raise OSError("no space")

    monkeypatch.setattr(gpu_check, "ask", lambda *given: (dict(DEVICE), ""))
    monkeypatch.setattr(gpu_check, "run_tests", broken)
    told = ended_early(monkeypatch, tmp_path, capsys)
    assert "The check itself did not end well: OSError: no space" in told and all_left_out(told)


def test_gpu_check_without_time_begins_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "ask", lambda what, end: (dict(DEVICE), "") if what == "--about" else ({}, "over"))
    monkeypatch.setattr(gpu_check, "_begun", lambda *given, **more: pytest.fail("was begun"))
    told = ended_early(monkeypatch, tmp_path, capsys, "--spent", "3000")
    assert "- not asked: over" in told and all_left_out(told)


def stand_in(code):
    """For `_begun`: a process that runs this in place of what is asked."""
    begun = gpu_check._begun
    return lambda *arguments, environment=None: begun("-c", code)


def test_gpu_check_ends_in_time_where_everything_hangs(monkeypatch, tmp_path, capsys):
    """Real processes that heed no interrupt: every shard, timing and question; the report names them all. 22 s stand
    for the whole, of which imports have had 2."""
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += "print('{\"cut', flush=True); time.sleep(600)"
    ask = gpu_check.ask
    monkeypatch.setattr(gpu_check, "ask", lambda what, end: (dict(DEVICE), "") if what == "--about" else ask(what, end))
    monkeypatch.setattr(gpu_check, "_begun", stand_in(code))
    monkeypatch.setattr(gpu_check, "ALL_LASTS", 22)
    monkeypatch.setattr(gpu_check, "LEAST_OP", 2)
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    begun = time.monotonic()
    told = ended_early(monkeypatch, tmp_path, capsys, "--asked", str(int(time.time()) - 2))
    assert time.monotonic() - begun < 20 + 2 * gpu_check.PIPE_LASTS + 1
    tested, timings = told.split("## Timings")
    assert all(f"- not done: {name}: not " in tested for name in gpu_check.shards())
    assert "not ended after" in tested and "- not asked: served: exit 124: ['{\"cut']" in tested
    assert all(f"- {op}: not timed, " in timings for op in gpu_check.timed()) and "exit 124" in timings


def test_the_device_waits_until_the_host_has_asked_for_all(monkeypatch):
    """A call shorter than the host's part in it would be timed by the host."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("mark")

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: done.append(("wait", clocks)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("end"))
    monkeypatch.setattr(timing, "_flush_buffer", lambda: torch.empty(1))
    assert timing.Clock("cuda").once(lambda: done.append("call"), repeats=2) == pytest.approx(2e-3)
    assert done == [("wait", timing.LEAST_AHEAD), *["mark", "call", "mark"] * 2, "end"]
    done.clear()
    timing.Clock("cuda").once(lambda: None, repeats=50)
    assert done[0] == ("wait", 50 * timing.AHEAD) and len(done) == 102


def test_a_sample_fits_into_the_queue_of_the_device(monkeypatch):
    """Where the host has to wait for a place in it, calls are timed by the host again."""
    monkeypatch.setattr(timing, "_once_on_gpu", lambda call, repeats: 1e-6)
    assert timing.Clock("cuda")._repeats(lambda: None) * (3 + 16) < 1000
    monkeypatch.setattr(timing.Clock, "once", lambda self, call: 1e-6)
    assert timing.Clock("cpu")._repeats(lambda: None) == 1000


@pytest.mark.parametrize("sees, made", [(True, False), (True, True), (False, False)])
def test_the_machines_own_python_serves_where_it_sees_a_gpu(sees, made, tmp_path):
    """The GPU machine has torch and no network, so that no .venv can be made there."""
    script = Path(gpu_check.__file__).with_suffix(".sh")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / script.name).write_bytes(script.read_bytes())
    for name, code in (("bin/python3", not sees), ("bin/make", 0), (".venv/bin/python", 0)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/log\nexit {int(code)}\n')
        path.chmod(0o755)
    if made:
        (tmp_path / ".venv" / ".uvg-dev").touch()
    run_script(tmp_path).check_returncode()
    *_, last = (tmp_path / "log").read_text().splitlines()
    assert last.startswith(f"{'bin/python3' if sees and not made else '.venv/bin/python'} -m bench.gpu_check --spent")


def run_script(folder, **environment):
    """The script of a copied tree, with what lies in its bin before all else."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    clean |= {"PATH": f"{folder}/bin:{clean['PATH']}", **environment}
    return subprocess.run(["bash", "bench/gpu_check.sh"], cwd=folder, env=clean, capture_output=True, text=True)


def with_commands(folder, case):
    """The script in a tree whose make and Pythons do what a shell's `case` says for "NAME ARGUMENTS"."""
    for name in ("bench/gpu_check.sh", "bin/make", "bin/python3", ".venv/bin/python"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/bash\ncase "{name} $*" in {case} ;; esac\n[ "$1" != -c ]\n')
        path.chmod(0o755)
    script = Path(gpu_check.__file__).with_suffix(".sh")
    (folder / "bench" / script.name).write_bytes(script.read_bytes())


@pytest.mark.parametrize("part", ["make", "import", "bench.gpu_check"])
def test_the_script_ends_whatever_hangs(part, tmp_path):
    """A build, a look at the installed package, or the check itself, all deaf to TERM; seconds stand for minutes."""
    with_commands(tmp_path, f'*{part}*) trap "" TERM; for i in $(seq 90); do sleep 1; done')
    begun = time.monotonic()
    own = {"PYTHON": "python3"} if part == "import" else {}
    done = run_script(tmp_path, UVG_BUILD_ENDS="2", UVG_CHECK_ENDS="4", **own)
    assert time.monotonic() - begun < 30 and done.returncode == 1
    told = (tmp_path / json.loads(done.stdout)["report"]).read_text()
    assert "All well: no." in told
    assert ("bench.gpu_check ended with exit" if part == "bench.gpu_check" else "Building ended with exit") in told


def test_the_script_reports_a_check_that_breaks(tmp_path):
    with_commands(tmp_path, "*bench.gpu_check*) exit 1")
    done = run_script(tmp_path)
    report = tmp_path / json.loads(done.stdout)["report"]
    assert done.returncode == 1 and "bench.gpu_check ended with exit 1 after" in report.read_text()
    with_commands(tmp_path, """*bench.gpu_check*) echo '{"ok": false}'; exit 1""")
    done = run_script(tmp_path)
    assert done.returncode == 1 and json.loads(done.stdout) == {"ok": False} and not report.exists()


def gone(pid):
    """Whether a process has ended, within some seconds."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_an_interrupt_ends_the_script_and_what_it_began(tmp_path):
    with_commands(tmp_path, f"*bench.gpu_check*) echo $$ > {tmp_path}/pid; sleep 90")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    clean["PATH"] = f"{tmp_path}/bin:{clean['PATH']}"
    script = subprocess.Popen(["bash", "bench/gpu_check.sh"], cwd=tmp_path, env=clean, stderr=subprocess.DEVNULL)
    assert written(tmp_path / "pid")
    script.send_signal(signal.SIGINT)
    assert script.wait(20) == 130 and gone(int((tmp_path / "pid").read_text()))


def test_a_check_that_is_ended_ends_what_it_began(tmp_path):
    code = "import signal\nfrom bench import gpu_check\nsignal.signal(signal.SIGTERM, gpu_check._stop)\n"
    begun = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(90)"
    code += f"gpu_check._ended(gpu_check._begun('-c', {begun!r}), 90)"
    check = subprocess.Popen([sys.executable, "-c", code], cwd=gpu_check.ROOT)
    assert written(tmp_path / "pid")
    check.terminate()
    assert check.wait(30) == 128 + signal.SIGTERM and gone(int((tmp_path / "pid").read_text()))


def written(path):
    """Whether a line comes to stand in a file, within a minute."""
    for _ in range(600):
        if path.exists() and path.read_text().endswith("\n"):
            return True
        time.sleep(0.1)
    return False

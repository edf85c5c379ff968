"""The front door: help, usage errors, exit codes, signals and pipes."""

import logging
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from uvg_engine import __version__
from uvg_engine.cli._notes import notes_on_stderr

COMMANDS = ("generate", "caption", "joint", "train", "export", "eval", "data", "data export", "doctor", "bench")
UVG = (sys.executable, "-m", "uvg_engine.cli")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from uvg_engine.cli import main\n"
        f"codes = [main([*command.split(), '--help']) for command in ('', *{COMMANDS})]\n"
        "heavy = {'torch', 'numpy', 'av', 'PIL', 'sklearn', 'scipy', 'yaml', 'safetensors'} & set(sys.modules)\n"
        "print(set(codes), heavy, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == "{0} set()"
    for command in COMMANDS:
        assert f"Usage: uvg {command} " in ran.stdout


def test_notes_tell_what_kernels_compile(capsys):
    log, other = logging.getLogger("uvg_engine.kernels"), logging.getLogger("uvg_engine.training")
    with notes_on_stderr():
        log.info("first call of a kernel")
        other.info("a detail")
        other.warning("a warning")
    log.info("told to nobody")
    assert capsys.readouterr().err == "note: first call of a kernel\nnote: a warning\n"


@pytest.mark.parametrize("command", ["", "data"])
def test_a_command_group_alone_shows_its_help(uvg, command):
    ran = uvg(*command.split())
    assert ran.code == 0 and "Usage: uvg" in ran.out and ran.err == ""


def test_version(uvg):
    assert __version__ == version("uvg-engine"), "pyproject.toml has another one"
    ran = uvg("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"uvg-engine {__version__}\n", "")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("nonsense", "nonsense"),
        ("data nonsense", "nonsense"),
        ("generate", "PROMPT"),
        ("generate one", "--output"),
        ("generate one -o", "-o"),
        ("generate one -o a.mp4 --bogus", "--bogus"),
        ("generate one -o a.mp4 --steps many", "--steps"),
        ("generate one -o a.mp4 --threads 0", "--threads"),
        ("generate one -o a.mp4 --threads 100000", "--threads"),  # it ended the process
        ("joint one", "--output"),
        ("caption", "FILE"),
        ("train", "--config"),
        ("export", "run"),
        ("eval --limit 0", "--limit"),
        ("eval --seed -1", "--seed"),
        ("data export", "--output"),
        ("data export -o d --count 0", "--count"),
        ("doctor now", "now"),
    ],
)
def test_usage_errors_are_a_line_and_the_way_to_help(uvg, line, told):
    ran = uvg(*line.split())
    error, *see = ran.err.splitlines()
    assert ran.code == 2 and ran.out == "" and error.startswith("error: ") and told.lower() in error.lower()
    assert len(see) <= 1 and all(hint.startswith("see: uvg ") and hint.endswith(" --help") for hint in see)
    assert os.listdir() == []


def test_traceback_on_request(uvg):
    line = ("generate", "one", "-o", "a.avi")
    quiet, loud = uvg(*line), uvg("--traceback", *line)
    assert quiet.code == loud.code == 2
    assert "Traceback" not in quiet.err and "Traceback" in loud.err and loud.err.endswith(quiet.err)


def test_what_is_nobodys_mistake_has_its_traceback(uvg, broken_model):
    Path("a.mp4").write_bytes(b"what was there before")
    ran = uvg("generate", "a red one", "-o", "a.mp4", "--model", broken_model)
    assert ran.code == 1 and ran.out == "" and "Traceback" in ran.err and "SamplingError" in ran.err
    assert os.listdir() == ["a.mp4"] and Path("a.mp4").read_bytes() == b"what was there before"


def test_ctrl_c_leaves_nothing_behind(model, tmp_path):
    line = (*UVG, "generate", "an unheard word", "-o", "a.mp4", "--steps", "100000", "--model", model)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(line, cwd=tmp_path, text=True, preexec_fn=_listen_to_ctrl_c, **pipes)
    try:
        first = process.stderr.readline()  # the words were read: sampling begins
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    finally:
        process.kill()
    assert first.startswith("note: "), first + err
    assert (process.returncode, out) == (130, "") and err.endswith("stopped\n") and os.listdir(tmp_path) == []


def _listen_to_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores it, and so would its children


def test_a_reader_that_goes_away_is_no_error_to_talk_about():
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run([*UVG, "--version"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_told_in_a_line():
    with open("/dev/full", "w") as full:
        ran = subprocess.run([*UVG, "--version"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ran.returncode, ran.stderr) == (2, "error: stdout: No space left on device\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_not_missed(tmp_path, closed):
    command = f"{sys.executable} -m uvg_engine.cli data export -o {tmp_path / 'clips'} --count 1 {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "clips" / "metadata.jsonl").is_file()
    wrong = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr

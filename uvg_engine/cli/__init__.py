"""The command `uvg`. Results go to stdout, everything else to stderr.

Exit codes: 0 done; 1 something unexpected, with its traceback (without one where the reader of stdout has gone away);
2 a mistake of the caller's, in one line; 130 Ctrl-C.
Nothing heavy is imported before a command runs: `uvg --help` is quick.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

import typer

from uvg_engine import __version__
from uvg_engine.cli._notes import notes_on_stderr
from uvg_engine.cli.bench import bench
from uvg_engine.cli.caption import caption
from uvg_engine.cli.data import data
from uvg_engine.cli.doctor import doctor
from uvg_engine.cli.evaluate import evaluate
from uvg_engine.cli.generate import generate, joint
from uvg_engine.cli.train import export, train
from uvg_engine.process import keep_freed_memory, wait_briefly

app = typer.Typer(
    name="uvg",
    help="Video from a sentence, a sentence from a video, both at once.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate)
app.command("caption")(caption)
app.command("joint")(joint)
app.command("train")(train)
app.command("export")(export)
app.command("eval")(evaluate)
app.add_typer(data, name="data")
app.command("doctor")(doctor)
app.command("bench", context_settings={"ignore_unknown_options": True})(bench)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
    trace: bool = typer.Option(False, "--traceback", help="Show where in the code an error arose, also for a mistake."),
) -> None:
    if version:
        print(f"uvg-engine {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main(args: Sequence[str] | None = None) -> int:
    """Run `uvg` with these arguments (None: the program's own). Returns the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    _prepare_streams()
    keep_freed_memory()
    wait_briefly()
    try:
        with notes_on_stderr():
            code = app(args, prog_name="uvg", standalone_mode=False)
        if code == 130:  # so newer typers tell Ctrl-C
            raise KeyboardInterrupt
        return _flushed(code if isinstance(code, int) else 0)
    except SystemExit as stop:
        return _flushed(stop.code if isinstance(stop.code, int) else 1)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return _flushed(130)
    except Exception as error:
        return _flushed(_failed(error, "--traceback" in args))


def _prepare_streams() -> None:
    """What is written to a stdout or stderr that the caller closed goes nowhere; no file of ours takes its number.
    Letters that stdout does not have are escaped: an error would come after the work."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # the names of files may be bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")


def _failed(error: Exception, trace: bool) -> int:
    """Tell the error as its kind deserves; returns the exit code."""
    usage = getattr(error, "format_message", None)  # of a wrong option: click's own class, which typer may bring along
    if usage is None and not isinstance(error, (ValueError, OSError)):
        traceback.print_exception(error)
        return 1
    if trace:
        traceback.print_exception(error)
    print(f"error: {_one_line(usage() if usage is not None else _told(error))}", file=sys.stderr)
    context = getattr(error, "ctx", None)
    if context is not None:
        print(f"see: {context.command_path} --help", file=sys.stderr)
    return 2


def _told(error: Exception) -> str:
    """The message; of an OSError as the system raises it, without its number."""
    if isinstance(error, OSError) and error.strerror and str(error).startswith("[Errno"):
        return f"{error.filename or 'stdout'}: {error.strerror}"
    return str(error)


def _flushed(code: int) -> int:
    """The exit code, stdout written; where it cannot be, what is left of it goes nowhere and the code tells."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # or Python's own flush at the end would fail again, and loudly
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return code or 1
        return code or _failed(error, False)
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "no message"

"""Warnings of the package as one line each, for people: 'note: ...' on stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PACKAGE = str(Path(__file__).parents[1])


def note(message: str) -> None:
    """One line on stderr."""
    print(f"note: {message}", file=sys.stderr)


@contextlib.contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Inside: UserWarnings raised by this package's code, and its log, are notes; other warnings stay as they are.
    Kernels also tell what they compile at a first call, which may take a while."""
    log, kernels = logging.getLogger("uvg_engine"), logging.getLogger("uvg_engine.kernels")
    handler, level = _Notes(), kernels.level
    log.addHandler(handler)
    kernels.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            usual = warnings.showwarning

            def show(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
                if issubclass(category, UserWarning) and filename.startswith(_PACKAGE):
                    note(str(message))
                else:
                    usual(message, category, filename, *rest, **more)

            warnings.showwarning = show
            warnings.filterwarnings("always", category=UserWarning, module=r"uvg_engine\.")
            yield
    finally:
        kernels.setLevel(level)
        log.removeHandler(handler)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())

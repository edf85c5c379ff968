"""Progress on stderr: a bar in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_LINE_EVERY = 30.0  # seconds, where stderr is no terminal


class Progress:
    """`with Progress("captions", total) as bar: bar.advance()`. done: how much was there before. unit: of the count.
    lines: no bar, which has a thread of its own, for what is being timed."""

    def __init__(
        self, label: str, total: int | None = None, *, done: int = 0, unit: str = "", lines: bool = False
    ) -> None:
        self.label, self.total, self.done, self.unit, self.lines = label, total, done, unit, lines
        self._bar: Any = None
        self._task: Any = None
        self._last = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and not self.lines:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self.unit),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=self.unit == "steps")
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, note="")
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done. note: shown at the end of the line."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, description=self.label, completed=self.done, total=self.total, note=note)
        elif time.monotonic() - self._last >= _LINE_EVERY:
            self._last = time.monotonic()
            of = "" if self.total is None else f"/{self.total}"
            print(f"{self.label}: {self.done}{of} {self.unit} {note}".rstrip(), file=sys.stderr, flush=True)

    def show(self, label: str, done: int, total: int) -> None:
        """Stand at `done` of `total`, under this label: for work in several parts."""
        self.label, self.done, self.total = label, done, total
        self.advance(0)

    def sampling(self, requests: int) -> Any:
        """A callback for the engine that counts the steps of this many requests."""

        def callback(done: int, total: int, request: object) -> None:
            self.total = total * requests
            self.advance()

        return callback

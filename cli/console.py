"""The terminal: progress with ETA where there is one, plain lines where there is not; results on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from efrapq.io.text import printable
from efrapq.progress import Task

__all__ = ["TerminalReporter", "err", "out", "table"]

# A line of progress no more often than this where no bar can be drawn.
PLAIN_INTERVAL = 10.0
PIPE_WIDTH = 120


def out() -> Console:
    """For results. NO_COLOR is honoured by rich. A pipe has no width: tables get room there."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console


def err() -> Console:
    """For progress, notes and warnings."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table: names to the left, everything after the first column to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", header_style="bold", no_wrap=True)
    return made


class _BarTask:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, note: str = "", units: float = 1.0) -> None:
        self._progress.update(self._task, advance=units, note=escape(printable(note)))


class _PlainTask:
    def __init__(self, console: Console, description: str, total: float) -> None:
        self._console, self._description, self._total = console, description, total
        self._done, self._started, self._said = 0.0, time.monotonic(), time.monotonic()

    def advance(self, note: str = "", units: float = 1.0) -> None:
        self._done += units
        now = time.monotonic()
        if now - self._said < PLAIN_INTERVAL:
            return
        self._said = now
        left = (now - self._started) / self._done * (self._total - self._done)
        share = 100 * self._done / self._total
        line = f"{self._description}: {share:.0f} %, about {left:.0f} s left ({printable(note)})"
        self._console.print(line, markup=False)


class TerminalReporter:
    """Draws bars on a terminal and writes plain lines elsewhere; quiet keeps the warnings only."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = err()
        self._quiet = quiet

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        if self._quiet:
            yield _PlainTask(Console(quiet=True), description, total)
            return
        started = time.monotonic()
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[note]}"),
            )
            with Progress(*columns, console=self._console, transient=True) as progress:
                yield _BarTask(progress, progress.add_task(escape(description), total=total, note=""))
        else:
            yield _PlainTask(self._console, description, total)
        self._console.print(f"{description}: {time.monotonic() - started:.1f} s", markup=False)

    def note(self, text: str) -> None:
        if not self._quiet:
            self._console.print(printable_line(text), markup=False)

    def warn(self, text: str) -> None:
        self._console.print(f"[yellow]note:[/yellow] {escape(printable_line(text))}")


def printable_line(text: str) -> str:
    """Texts are ours, but they quote names from files."""
    return printable(text, limit=2000)

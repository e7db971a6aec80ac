"""How long work reports itself: the library talks to a `Reporter`, the command line decides what is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Reporter", "Silent", "Task"]


class Task(Protocol):
    """One bar: `advance` after each finished unit, with a word on what was just done."""

    def advance(self, note: str = "", units: float = 1.0) -> None: ...


class Reporter(Protocol):
    """Where progress and remarks go."""

    def task(self, description: str, total: float) -> AbstractContextManager[Task]: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


class _SilentTask:
    def advance(self, note: str = "", units: float = 1.0) -> None:
        pass


class Silent:
    """A reporter that keeps the warnings (`warnings`) and draws nothing."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        yield _SilentTask()

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.warnings.append(text)

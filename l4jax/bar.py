"""The progress bar of long work, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress, TaskID


class Bar:
    """A bar that appears when work begins; it is taken away again if the context ends before any of it is done."""

    def __init__(self) -> None:
        self._progress = Progress(console=Console(stderr=True))
        self._task: TaskID | None = None
        self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._done:
            self._progress.stop()
        else:
            self._progress.live.transient = True
            self._progress.live.stop()

    def update(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` is done, and what it is."""
        if self._task is None:
            self._task = self._progress.add_task(what, total=total)
            self._progress.start()
        self._progress.update(self._task, description=what, completed=done, total=total)
        self._done = max(self._done, done)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def bar_if(wanted: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar's ``update``; if none is wanted, a function that does nothing."""
    if not wanted:
        yield lambda what, done, total: None
        return
    with Bar() as bar:
        yield bar.update

"""Silences Orbax, so that a read or write that fails is reported once: by the exception that it raises."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import override


@contextmanager
def only_the_error() -> Iterator[None]:
    """Run Orbax without what it prints besides the error that it raises.

    Orbax warns that there is no OCDBT database to merge, and logs a failed task with its traceback. It also closes its event loop while
    other tasks are still running; then tensorstore's threads report to a closed loop and unfinished coroutines are destroyed, and Python
    prints a traceback for each, at any later time. A loop that finishes its tasks first leaves nothing to report.
    """
    absl_logger, new_event_loop = logging.getLogger("absl"), asyncio.new_event_loop
    absl_logger.addFilter(_drop)
    asyncio.new_event_loop = _FinishingLoop
    try:
        yield
    finally:
        asyncio.new_event_loop = new_event_loop
        absl_logger.removeFilter(_drop)


def _drop(_: logging.LogRecord) -> bool:
    return False


class _FinishingLoop(asyncio.SelectorEventLoop):
    """An event loop that runs its tasks to their ends before it closes."""

    @override
    def close(self) -> None:
        tasks = [] if self.is_closed() else asyncio.all_tasks(self)

        async def finish() -> None:
            # Also retrieves their exceptions, which asyncio would report otherwise.
            await asyncio.gather(*tasks, return_exceptions=True)

        if tasks:
            self.run_until_complete(finish())
        super().close()

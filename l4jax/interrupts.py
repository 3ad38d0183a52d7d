"""Ctrl-C that ends long work wherever it falls."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def kept_interrupts() -> Iterator[Callable[[], None]]:
    """Keep each Ctrl-C while the context lasts; the function that it yields raises KeyboardInterrupt if there was one.

    Python drops an exception raised in a callback of the garbage collector (JAX has one), a finaliser or a weak reference: it reports
    "Exception ignored in" and continues. Work that calls the function at each step ends there instead. Has no effect outside the main
    thread, to which Python delivers signals, or where Ctrl-C is ignored.
    """
    kept = False

    def check() -> None:
        if kept:
            raise KeyboardInterrupt

    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield check
        return

    def keep(number: int, frame: FrameType | None) -> None:
        nonlocal kept
        try:
            handler(number, frame)
        except KeyboardInterrupt:
            kept = True
            raise

    def report_others(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)

    signal.signal(signal.SIGINT, keep)
    sys.unraisablehook = report_others
    try:
        yield check
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, handler)

"""An answer's text, as it is generated."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from l4jax.engine.engine import Engine
from l4jax.engine.handle import TextHandle
from l4jax.interrupts import kept_interrupts
from l4jax.request import Completion, Request


class Stream(Iterator[str]):
    """Text as it is generated: an iterator of strings, none of them empty. ``completion`` is set once it has ended.

    Several streams, and other calls, are computed together. Nothing more is computed for a stream that is closed or dropped; on several
    hosts only process 0 can end a stream.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self._handle = engine.add(request, TextHandle)
        weakref.finalize(self, self._handle.cancel).atexit = False

    @property
    def completion(self) -> Completion | None:
        """The whole answer, once it has ended."""
        return self._handle.completion

    def __next__(self) -> str:
        """The next piece. Raises the request's error if it has failed, RuntimeError if the stream was closed."""
        handle, text = self._handle, ""

        def came() -> bool:
            nonlocal text
            over = handle.over  # read first: the last text is there before ``over`` is set
            text = text or handle.new_text()
            return bool(text) or over

        try:
            with kept_interrupts() as check_interrupts:
                self._engine.run_until(came, check_interrupts)
        except BaseException:
            handle.put_back(text)  # Ctrl-C came when the piece was there
            raise
        if text:
            return text
        if handle.error is not None:
            raise handle.error
        raise StopIteration

    def close(self) -> None:
        """End the stream: nothing more is computed for it."""
        self._handle.cancel()

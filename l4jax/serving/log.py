"""The log of requests: one JSON object a line. What clients write and get is in it only if the operator asked for that."""

from __future__ import annotations

import datetime
import logging
import os
import queue
import threading
from collections.abc import Mapping
from typing import Any

import msgspec

LOGGER = logging.getLogger("l4jax.serving")
_MOST_WAITING = 16 << 20
"""Bytes of lines that may wait to be written; further lines are dropped, and no request waits for a disk."""


class RequestLog:
    """Appends lines to a file in a thread of its own. If that fails, lines are dropped, and the server goes on."""

    def __init__(self, path: str, *, texts: bool) -> None:
        """``path``: a file, which is made if need be, or "-" for standard error. ``texts``: whether prompts and answers are logged too.

        Raises OSError if the file cannot be opened.
        """
        self.texts = texts
        self._descriptor = os.dup(2) if path == "-" else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._path = path
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._waiting = self._written = 0  # bytes since the start; each is changed by one thread only
        self._fails = False
        self._thread = threading.Thread(target=self._write_lines, name="log", daemon=True)
        self._thread.start()

    def write(self, fields: Mapping[str, Any]) -> None:
        """Log an object, after the time."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = msgspec.json.encode({"time": now, **fields}) + b"\n"
        if self._waiting - self._written + len(line) > _MOST_WAITING:
            self._warn("lines come faster than they can be written")
            return
        self._waiting += len(line)
        self._lines.put(line)

    def close(self) -> None:
        """Write what waits, for at most a second, and close the file."""
        self._lines.put(None)
        self._thread.join(1)

    def _write_lines(self) -> None:
        while (line := self._lines.get()) is not None:
            size = len(line)
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
                self._fails = False
            except OSError as error:
                self._warn(os.strerror(error.errno or 0))
            self._written += size
        os.close(self._descriptor)

    def _warn(self, why: str) -> None:
        """Say once that lines are dropped, until one is written again."""
        if not self._fails:
            self._fails = True
            LOGGER.warning("requests are not logged to %s: %s; they are answered all the same", self._path, why)

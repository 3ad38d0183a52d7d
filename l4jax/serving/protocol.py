"""HTTP/1.1 as uvicorn speaks it, with the limits that it lacks."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEADER_BYTES = 64 << 10
MAX_PIPELINED = 8
"""Requests of a connection that may wait for the answers to earlier ones."""
HEADER_SECONDS = 30.0
"""How long a request's first line and headers may take to arrive."""
_UPGRADE = re.compile(rb"(\r\n)u(pgrade:)", re.IGNORECASE)


class LimitedProtocol(HttpToolsProtocol):
    """Closes connections whose headers are too long or too slow, and ignores wishes for another protocol.

    Clients that offer HTTP/2 (curl, Java) ask to upgrade to it. The parser would take a request's body for data of the new protocol.
    """

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._header_bytes = 0
        self._in_headers = True
        self._came_further = False  # to the end of headers or of a body, with the data received last
        self._running: RequestResponseCycle | None = None
        self._deadline: asyncio.TimerHandle | None = self.loop.call_later(HEADER_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request that is being answered."""
        self._stop_waiting()
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            # uvicorn tells only the newest request, which may wait for this one.
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass data on to the parser."""
        if self._in_headers:
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(rb"\1x\2", head) + end + rest
        self._came_further = False
        super().data_received(data)
        if self._in_headers and not self._came_further and self.parser is not None:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self.transport.write(_TOO_LONG)
                self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins, on a new connection or after another one."""
        super().on_message_begin()
        self._header_bytes, self._in_headers = 0, True
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def on_headers_complete(self) -> None:
        """A request's headers are there."""
        self._stop_waiting()
        self._in_headers, self._came_further = False, True
        super().on_headers_complete()
        # Requests that wait for another one's answer: reading goes on, or the connection's end would not be noticed.
        self.flow.resume_reading()
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.close()

    def on_message_complete(self) -> None:
        """A request is there with its body."""
        self._in_headers, self._header_bytes, self._came_further = True, 0, True
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


_MESSAGE = b'{"error":{"message":"the headers are longer than 64 KiB; send less","type":"invalid_request_error","param":null,"code":null}}'
_TOO_LONG = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    % len(_MESSAGE)
    + _MESSAGE
)

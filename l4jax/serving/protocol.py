"""HTTP/1.1 as uvicorn speaks it, with the limits that it lacks."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from l4jax.serving.errors import ApiError

MAX_HEADER_BYTES = 64 << 10
MAX_REQUEST_BYTES = 18 << 20
"""Of a whole request. A longer body than :data:`l4jax.serving.app.MAX_BODY_BYTES` is refused before; this ends what ignores that."""
MAX_PIPELINED = 8
"""Requests of a connection that may wait for the answers to earlier ones."""
HEADER_SECONDS = 30.0
"""How long a request's first line and headers may take to arrive."""
_UPGRADE = re.compile(rb"(\r\n)u(pgrade:)", re.IGNORECASE)


class LimitedProtocol(HttpToolsProtocol):
    """Closes connections whose requests are too long or too slow, and ignores wishes for another protocol.

    Clients that offer HTTP/2 (curl, Java) ask to upgrade to it. The parser would take a request's body for data of the new protocol.
    """

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._bytes = 0  # of the request that is arriving
        self._in_headers = True
        self._came_further = False  # to the end of headers or of a request, with the data received last
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
        if self.transport.is_closing():
            return
        if self._in_headers:
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(rb"\1x\2", head) + end + rest
        self._came_further = False
        super().data_received(data)
        if self.parser is None or self.transport.is_closing():
            return
        if not (self._in_headers and self._came_further):
            self._bytes += len(data)
        if self._in_headers and self._bytes > MAX_HEADER_BYTES:
            self._refuse(431, b"Request Header Fields Too Large", "the headers are longer than 64 KiB; send less")
        elif self._bytes > MAX_REQUEST_BYTES:
            self.transport.close()
        elif self.cycle is not None and self.cycle.response_complete and self._deadline is None and self.timeout_keep_alive_task is None:
            # What came was no request: the time that the connection may be idle goes on.
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_message_begin(self) -> None:
        """A request begins, on a new connection or after another one."""
        super().on_message_begin()
        self._bytes, self._in_headers = 0, True
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header has come; those that follow a body are dropped."""
        if self._in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request's headers are there."""
        self._stop_waiting()
        self._in_headers, self._came_further = False, True
        if self.parser.should_upgrade():
            self._refuse(400, b"Bad Request", "the request asks for another protocol; send it without an Upgrade header")
            return
        super().on_headers_complete()
        # Requests that wait for another one's answer: reading goes on, or the connection's end would not be noticed.
        self.flow.resume_reading()
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.close()

    def on_body(self, body: bytes) -> None:
        """A part of a body has come."""
        if self.transport.is_closing():
            return
        super().on_body(body)
        if self.pipeline:
            self.flow.resume_reading()
            if len(self.cycle.body) > MAX_HEADER_BYTES:
                self.transport.close()

    def on_message_complete(self) -> None:
        """A request is there with its body."""
        self._in_headers, self._bytes, self._came_further = True, 0, True
        if not self.transport.is_closing():
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _unsupported_upgrade_warning(self) -> None:
        pass  # it was refused

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: int, reason: bytes, message: str) -> None:
        """Answer without the application, and close the connection."""
        body = ApiError(message).body
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(head % (status, reason, len(body)) + body)
        self.transport.close()

"""One request over HTTP/1.1.

Each request has a connection of its own, so that closing it cancels the request. Times are taken as soon as data is read.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, Self

from l4jax.bench.answer import Answer, Failure, Reader

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Server:
    """Where requests go. ``base``: what stands before ``/v1`` in paths; ``address``: of ``host``, looked up once."""

    host: str
    port: int
    base: str = ""
    key: str | None = dataclasses.field(default=None, repr=False)
    address: str | None = None

    @classmethod
    def parse(cls, url: str, key: str | None) -> Self:
        """The server of ``--url`` and ``--api-key``. Raises ValueError if they cannot be used."""
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"--url {url} is no URL ({error}); expected http://HOST:PORT") from error
        path = parts.path.rstrip("/").removesuffix("/v1")
        usable = url.isascii() and url.isprintable() and " " not in url and not (parts.username or parts.query or parts.fragment)
        if parts.scheme != "http" or not host or not usable:
            raise ValueError(f"--url is {url!r}; expected http://HOST:PORT, without TLS: measure the server itself, not a proxy before it")
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
            raise ValueError("--api-key is empty, begins or ends with a space, or is not printable ASCII; correct it")
        return cls(host, 80 if port is None else port, path, key)

    def request(self, path: str, body: bytes | None = None) -> bytes:
        """A whole request: a POST of JSON, or a GET if there is no body."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{'GET' if body is None else 'POST'} {self.base}{path} HTTP/1.1", f"host: {host}:{self.port}", "connection: close"]
        if self.key is not None:
            lines.append(f"authorization: Bearer {self.key}")
        if body is not None:
            lines += ["content-type: application/json", f"content-length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


class _Connection(asyncio.Protocol):
    """``begun`` is done after the first text, ``over`` after the answer; both after a failure."""

    def __init__(self, request: bytes, answer: Answer, clock: Clock) -> None:
        loop = asyncio.get_running_loop()
        self._request, self._clock = request, clock
        self._answer, self.reader = answer, Reader(answer)
        self.begun: asyncio.Future[None] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = self._clock()
        self.reader.feed(data, now)
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reader.lost(exc, self._clock())
        self._tell()

    def _tell(self) -> None:
        if (self.reader.is_over or self._answer.content_times) and not self.begun.done():
            self.begun.set_result(None)
        if self.reader.is_over and not self.over.done():
            self.over.set_result(None)


@dataclasses.dataclass(frozen=True)
class Cancel:
    """When to cancel a request: ``seconds`` after its first text; or, if not ``in_stream``, after it was sent, or at the first text."""

    in_stream: bool
    seconds: float


async def stream(
    server: Server, path: str, body: bytes, *, timeout_s: float, cancel: Cancel | None = None, clock: Clock = time.perf_counter
) -> Answer:
    """Post a request for a stream, and return what came of it. Nothing of it is left open.

    Failures are in the answer; one that does not say how many tokens it has is a failure.
    """
    answer = await _exchange(server, server.request(path, body), timeout_s, cancel, clock)
    if answer.finished and answer.usage is None:
        answer.failure = Failure("protocol", "the answer is not a stream of events; expected content-type text/event-stream")
    return answer


async def get(server: Server, path: str, *, timeout_s: float) -> Answer:
    """Get a document. Failures are in the answer."""
    return await _exchange(server, server.request(path), timeout_s, None, time.perf_counter)


async def _exchange(server: Server, request: bytes, timeout_s: float, cancel: Cancel | None, clock: Clock) -> Answer:
    answer = Answer(clock())
    loop = asyncio.get_running_loop()
    transport = connection = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, connection = await loop.create_connection(
                lambda: _Connection(request, answer, clock), server.address or server.host, server.port
            )
            if cancel is not None:
                if cancel.in_stream:
                    await connection.begun
                await asyncio.wait({connection.over if cancel.in_stream else connection.begun}, timeout=cancel.seconds)
                connection.reader.cancel(clock())
            if not answer.cancelled:
                await connection.over
    except TimeoutError:
        reader = Reader(answer) if connection is None else connection.reader
        reader.fail("timeout", f"no whole answer after {timeout_s:g} s", clock())
    except OSError as error:
        # asyncio's own texts repeat the address.
        why = error.strerror if error.errno is None or error.errno < 0 else os.strerror(error.errno)
        Reader(answer).fail("connection", f"no connection ({why or error})", clock())
    finally:
        if transport is not None and answer.cancelled:
            transport.close()  # after the request, if it is not yet written: the server is to see it
        elif transport is not None:
            transport.abort()
    return answer


async def address_of(server: Server) -> Server:
    """The server with its address, so that requests do not wait for a name to be looked up. Raises OSError if nobody listens there."""
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, server.host, server.port)
    try:
        return dataclasses.replace(server, address=transport.get_extra_info("peername")[0])
    finally:
        transport.abort()

"""The front's side of the engine process: sends it requests, and gives each what the engine computed for it."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import Callable

from l4jax.request import Request
from l4jax.serving import errors
from l4jax.serving.errors import ApiError
from l4jax.serving.messages import (
    LENGTH_BYTES,
    Add,
    Cancel,
    ErrorKind,
    LoadFailed,
    Message,
    News,
    Progress,
    Ready,
    Score,
    Step,
    decode_from_engine,
    frame,
)


class Inbox:
    """What came for the requests of one HTTP request."""

    def __init__(self) -> None:
        self._news: list[News] = []
        self._came = asyncio.Event()

    def put(self, news: News) -> None:
        """Add news."""
        self._news.append(news)
        self._came.set()

    async def take(self) -> list[News]:
        """Everything that came since the last call; waits until there is something."""
        await self._came.wait()
        self._came.clear()
        taken, self._news = self._news, []
        return taken


class EngineClient:
    """Speaks to the engine process over the front's end of their sockets."""

    def __init__(self, channel: socket.socket, *, max_waiting: int, stalled_seconds: float) -> None:
        """``max_waiting``: how many requests may wait beside those that are computed.

        ``stalled_seconds``: an engine that has requests and ends no step for longer counts as not ready.
        """
        self._channel = channel
        self._max_waiting = max_waiting
        self._stalled_seconds = stalled_seconds
        self._writer: asyncio.StreamWriter | None = None
        self._inboxes: dict[int, Inbox] = {}
        self._numbers = itertools.count(1)
        self._heard = time.monotonic()
        self.ready: Ready | None = None
        self.progress = Progress(0, 0)
        self.load_error: str | None = None
        self.closing: str | None = None
        """Why no further requests are taken, once that is so."""
        self._ended: tuple[str, ErrorKind] | None = None  # why all requests end at once from now on, and the kind of the error
        self.last_step: Step | None = None
        self.is_over = False
        """Whether the engine process has gone."""

    async def run(self, load: Message, on_progress: Callable[[], None]) -> None:
        """Let the engine load, and take in what it says until it has gone. ``on_progress`` is called while it loads."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._channel, limit=1 << 20)
        self._writer.write(frame(load))
        try:
            while True:
                length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
                message = decode_from_engine(await reader.readexactly(length))
                self._take(message)
                if isinstance(message, Progress | Ready):
                    on_progress()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.is_over = True
            self._writer.close()
            self._end_all("the engine has stopped; make the request again later", "failed")

    def end_all(self) -> None:
        """End all requests with an error, because the server ends."""
        self._end_all(self.closing or "the server is being stopped", "closing")

    def _end_all(self, why: str, kind: ErrorKind) -> None:
        self._ended = why, kind
        for number in list(self._inboxes):
            self.cancel(number)
            self._inboxes.pop(number).put(News(number, over=True, error=why, error_kind=kind))

    def why_not_ready(self) -> ApiError | None:
        """The error of a server that should get no requests now; None if it is ready."""
        if self.is_over:
            return errors.engine_stopped()
        if self.closing is not None:
            return errors.not_ready(self.closing)
        if self.ready is None:
            done = f": {self.progress.ready} of {self.progress.programs} programs" if self.progress.programs else ""
            return errors.not_ready(f"the model is being loaded{done}; try again later")
        if self._inboxes and (quiet := time.monotonic() - self._heard) > self._stalled_seconds:
            return errors.not_ready(f"the engine has requests, and has ended no step for {quiet:.0f} s; try again later")
        return None

    def check_room(self, answers: int) -> None:
        """Raise ApiError if there is no room for this many further answers."""
        ready = self.ready
        if self.is_over or self.closing is not None or ready is None:
            error = self.why_not_ready()
            assert error is not None
            raise error
        most = ready.slots + self._max_waiting
        if answers > most:
            raise ApiError(
                f"{answers} answers are asked for; expected at most {most} of this server; lower n or send fewer prompts", param="n"
            )
        if len(self._inboxes) + answers > most:
            raise errors.queue_full(answers, most - len(self._inboxes))

    def add(self, request: Request, inbox: Inbox) -> int:
        """Begin a request whose news go to the inbox; returns its number. See :meth:`check_room`."""
        number = next(self._numbers)
        prompt, stops = list(request.token_ids), list(request.stop_ids)
        return self._begin(Add(number, prompt, request.params, request.seed, stops, request.scope), inbox)

    def score(self, token_ids: list[int], top: int, inbox: Inbox) -> int:
        """Begin to score a prompt, as :meth:`add` begins a request."""
        return self._begin(Score(next(self._numbers), token_ids, top), inbox)

    def cancel(self, number: int) -> None:
        """End a request, unless it has ended. It counts against the limit until the engine confirms its end."""
        if number in self._inboxes:
            self._send(Cancel(number))

    def _begin(self, message: Add | Score, inbox: Inbox) -> int:
        if self._ended is not None:
            why, kind = self._ended
            inbox.put(News(message.number, over=True, error=why, error_kind=kind))
            return message.number
        if not self._inboxes:
            self._heard = time.monotonic()  # an idle engine says nothing
        self._inboxes[message.number] = inbox
        self._send(message)
        return message.number

    def _send(self, message: Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(message))

    def _take(self, message: Message) -> None:
        self._heard = time.monotonic()
        match message:
            case Progress():
                self.progress = message
            case Ready():
                self.ready = message
            case LoadFailed():
                self.load_error = message.why
            case Step():
                self.last_step = message
                for news in message.news:
                    inbox = self._inboxes.get(news.number)
                    if inbox is not None:
                        inbox.put(news)
                    if news.over:
                        self._inboxes.pop(news.number, None)

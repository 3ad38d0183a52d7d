"""An answer as it comes: when its text came, how many tokens the server counted, and how it ended.

Times are in seconds, on the clock of ``time.perf_counter``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import httptools
import msgspec

_MESSAGE_CHARACTERS = 500
"""Of an error's message; servers may repeat the whole prompt in theirs."""

NO_USAGE = "the answer does not say how many tokens it has; expected a last chunk with usage, as asked by stream_options.include_usage"


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a request failed: a kind to count by, and a line of text."""

    kind: str
    message: str


@dataclasses.dataclass(frozen=True)
class Usage:
    """What the server reports of a request. ``cached``: prompt tokens that it did not compute again; None if it does not say."""

    prompt: int
    output: int
    cached: int | None = None


@dataclasses.dataclass
class Answer:
    """What came of a request.

    ``started``: before its connection was opened; ``content_times``: of each read that brought text; ``ended``: when the answer was
    complete, or the request had failed or was cancelled; ``body``: of an answer that is not a stream.
    """

    started: float
    content_times: list[float] = dataclasses.field(default_factory=list)
    ended: float = 0.0
    status: int = 0
    usage: Usage | None = None
    body: bytes = b""
    failure: Failure | None = None
    cancelled: bool = False

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and its tokens are known."""
        return self.failure is None and not self.cancelled


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def has_text(self) -> bool:
        delta = self.delta
        return bool(self.text or (delta and (delta.content or delta.reasoning or delta.reasoning_content)))


class _Chunk(msgspec.Struct):
    """What is read of an event; other fields are skipped."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class Reader:
    """Takes an answer as it comes, in pieces cut anywhere, and fills in ``answer``.

    A stream is over with its event ``[DONE]``; any other answer when its body is complete.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.is_over = False
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0
        self._has_content = False
        self._type = b""
        self._streams = False
        self._rest = b""  # of a line that has not ended
        self._data: list[bytes] = []  # the data lines of an event that has not ended

    def feed(self, data: bytes, now: float) -> None:
        """Take what was read at the time ``now``. What comes after the end is ignored."""
        if self.is_over:
            return
        self._now, self._has_content = now, False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.fail("protocol", f"the answer is not HTTP/1.1 ({error})", now)
        if self._has_content:
            self._answer.content_times.append(now)

    def lost(self, error: BaseException | None, now: float) -> None:
        """The connection has ended."""
        if self._answer.status not in (0, 200):
            self._fail_by_status(now)  # the status says more, even if its message is not whole
        else:
            why = "" if error is None else f" ({error})"
            self.fail("connection", f"the connection ended before the answer did{why}", now)

    def fail(self, kind: str, message: str, now: float) -> None:
        """End with an error, unless the answer is over."""
        if not self.is_over:
            line = " ".join(message.split())
            self._answer.failure = Failure(kind, line if len(line) <= _MESSAGE_CHARACTERS else line[: _MESSAGE_CHARACTERS - 3] + "...")
            self._end(now)

    def cancel(self, now: float) -> None:
        """End because the answer is not wanted any more, unless it is over."""
        if not self.is_over:
            self._answer.cancelled = True
            self._end(now)

    def _fail_by_status(self, now: float) -> None:
        self.fail(f"status {self._answer.status}", message_of(self._answer.body), now)

    def _end(self, now: float) -> None:
        self.is_over, self._answer.ended = True, now

    # What httptools calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header has come."""
        if name.lower() == b"content-type":
            self._type = value.lower()

    def on_headers_complete(self) -> None:
        """All headers have come."""
        self._answer.status = self._parser.get_status_code()
        self._streams = self._answer.status == 200 and self._type.startswith(b"text/event-stream")

    def on_body(self, body: bytes) -> None:
        """A part of the body has come, without its chunk's frame."""
        if not self._streams:
            self._answer.body += body
            return
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if self.is_over:
                return
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                event, self._data = b"\n".join(self._data), []
                self._on_event(event)

    def on_message_complete(self) -> None:
        """The body is complete."""
        if self._answer.status < 200:
            return  # more is to come
        if self._streams:
            self.fail("protocol", "the stream ended without `data: [DONE]`", self._now)
        elif self._answer.status != 200:
            self._fail_by_status(self._now)
        elif not self.is_over:
            self._end(self._now)

    def _on_event(self, event: bytes) -> None:
        if event == b"[DONE]":
            if self._answer.usage is None:
                self.fail("no usage", NO_USAGE, self._now)
            else:
                self._end(self._now)
            return
        try:
            chunk = _decode_chunk(event)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.fail("protocol", f"an event is not one of OpenAI's ({error}): {event.decode(errors='replace')}", self._now)
            return
        if chunk.error is not None:
            self.fail("stream", message_of(event), self._now)
            return
        if chunk.usage is not None:
            details = chunk.usage.prompt_tokens_details
            self._answer.usage = Usage(
                chunk.usage.prompt_tokens, chunk.usage.completion_tokens, None if details is None else details.cached_tokens
            )
        if any(choice.has_text for choice in chunk.choices):
            self._has_content = True


def message_of(body: bytes) -> str:
    """The message of an error, in OpenAI's form or FastAPI's; the whole text of any other."""
    try:
        fields: Any = msgspec.json.decode(body)
        for name in ("error", "message", "detail"):
            if isinstance(fields, dict) and fields.get(name):
                fields = fields[name]
        return fields if isinstance(fields, str) else msgspec.json.encode(fields).decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode(errors="replace") or "no message"

"""How the APIs write errors and streams."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from l4jax.serving.errors import ApiError


class Dialect(Protocol):
    """One way to write them."""

    end: bytes
    """What ends a stream that has not failed."""

    def event(self, fields: dict[str, Any]) -> bytes:
        """An object of a stream."""

    def error(self, error: ApiError, request_id: str) -> dict[str, Any]:
        """An error as an object."""


def _named_event(fields: dict[str, Any]) -> bytes:
    """An object with the name of its type."""
    return b"event: %s\ndata: %s\n\n" % (fields["type"].encode(), msgspec.json.encode(fields))


class OpenAI:
    """Events without names."""

    end = b"data: [DONE]\n\n"

    def event(self, fields: dict[str, Any]) -> bytes:
        """As in :class:`Dialect`."""
        return b"data: " + msgspec.json.encode(fields) + b"\n\n"

    def error(self, error: ApiError, request_id: str) -> dict[str, Any]:
        """As in :class:`Dialect`."""
        return error.fields


class Responses(OpenAI):
    """OpenAI's Responses API: named events, of which the last tells that a stream ends, or has failed."""

    end = b""

    def event(self, fields: dict[str, Any]) -> bytes:
        """As in :class:`Dialect`."""
        if "type" not in fields:  # an error before the first event of the answer
            error = fields["error"]
            fields = {"type": "error", "sequence_number": 0, **{name: error[name] for name in ("code", "message", "param")}}
        return _named_event(fields)


class Anthropic:
    """Events with names, which are also their objects' types. The last event of a stream tells that it ends."""

    end = b""

    def event(self, fields: dict[str, Any]) -> bytes:
        """As in :class:`Dialect`."""
        return _named_event(fields)

    def error(self, error: ApiError, request_id: str) -> dict[str, Any]:
        """As in :class:`Dialect`."""
        other = "invalid_request_error" if error.status < 500 else "api_error"
        kind = _ANTHROPIC_KINDS.get(error.status, other)
        return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


_ANTHROPIC_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    405: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def dialect_of(path: str) -> Dialect:
    """The dialect of a route."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return Anthropic()
    return Responses() if path == "/v1/responses" else OpenAI()

"""Errors as the APIs' clients expect them: a status, and a sentence that says what was given, what is expected and what to do."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

SOON = "1"
"""Seconds after which a client may ask again: what was refused for want of room may have room by then."""


class ApiError(Exception):
    """A request that is answered with an error. ``param``: the parameter at fault; ``code``: OpenAI's word for the fault, if it has one."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind, self.param, self.code = message, status, kind, param, code
        self.headers = dict(headers or {})

    @property
    def fields(self) -> dict[str, object]:
        """The error as an object of a stream or a response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def body(self) -> bytes:
        """The error as JSON."""
        return msgspec.json.encode(self.fields)


def not_ready(why: str) -> ApiError:
    """The server cannot take requests now."""
    return ApiError(why, status=503, kind="service_unavailable_error", code="not_ready", headers={"retry-after": SOON})


def too_many(waiting: int) -> ApiError:
    """The queue is full."""
    return ApiError(
        f"{waiting} requests wait already, which is as many as this server lets wait; try again later",
        status=429,
        kind="rate_limit_error",
        code="queue_full",
        headers={"retry-after": SOON},
    )


def failed(why: str) -> ApiError:
    """The engine could not finish the request; it may succeed when it is made again."""
    return ApiError(why, status=500, kind="server_error", code="engine_error")


def not_finite(request_id: str) -> ApiError:
    """The model's logits were NaN or infinite. Made again, the request would end in the same way."""
    return ApiError(
        f"the model's logits are not finite, so request {request_id} has no answer; its weights or their dtype are at fault",
        status=500,
        kind="server_error",
        code="logits_not_finite",
        headers={"x-should-retry": "false"},
    )

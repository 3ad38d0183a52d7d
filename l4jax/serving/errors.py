"""Errors as the APIs' clients expect them: a status, and a sentence that says what was given, what is expected and what to do."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

SOON = "1"
"""Seconds after which a client may ask again: what was refused for want of room may have room by then."""


class ApiError(Exception):
    """A request that is answered with an error. ``param``: the parameter at fault; ``code``: a word for programs."""

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
        """The error as an object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def body(self) -> bytes:
        """The error as JSON."""
        return msgspec.json.encode(self.fields)


def not_ready(why: str) -> ApiError:
    """The server cannot take requests now."""
    return ApiError(why, status=503, kind="service_unavailable_error", code="not_ready", headers={"retry-after": SOON})


def engine_stopped() -> ApiError:
    """The engine process has gone."""
    return ApiError("the engine has stopped, and this server ends", status=503, kind="service_unavailable_error", code="engine_stopped")


def queue_full(answers: int, room: int) -> ApiError:
    """There is no room for further answers now."""
    return ApiError(
        f"this request asks for {answers} answers, and there is room for {room} now; try again later",
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
        f"request {request_id} has no answer: the model's logits are not finite, because its values overflow or its weights are damaged; "
        "the operator can serve it with --dtype float32, or check it with `l4jax show --verify`",
        status=500,
        kind="server_error",
        code="logits_not_finite",
        headers={"x-should-retry": "false"},
    )

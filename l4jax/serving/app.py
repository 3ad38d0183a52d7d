"""The HTTP application: routes, keys, limits on what is read, and how answers are written."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import importlib.metadata
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from l4jax.serving import parameters
from l4jax.serving.api.chat import Chat, ChatBody
from l4jax.serving.api.completions import CompletionBody, Completions
from l4jax.serving.api.served import Served
from l4jax.serving.api.tokens import DetokenizeBody, TokenizeBody, detokenize, tokenize
from l4jax.serving.errors import ApiError, not_ready

LOGGER = logging.getLogger("l4jax.serving")
MOST_BODY_BYTES = 16 << 20
BODY_SECONDS = 30.0
"""How long a body may take to arrive."""
QUIET_SECONDS = 15.0
"""After so long without a chunk a stream gets a comment: proxies end connections that are silent."""
MOST_HEADERS = 100
_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
OPEN_ROUTES = ("/health", "/ready")
_INLINE_BYTES = 16 << 10
"""Larger bodies are read and tokenised in a thread, so that other streams go on."""


class Answers(Protocol):
    """A checked request of one of the APIs."""

    streams: bool

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""

    def stream(self) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer as chunks; those that came together are one list."""

    def close(self) -> None:
        """End what is still computed for it."""


class Keys:
    """The API keys; without any, everybody is let in."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def found(self, scope: Scope) -> str | None:
        """The key of a request; None if none is needed. Raises ApiError for a wrong or missing one."""
        if not self._keys:
            return None
        headers = dict(scope["headers"])
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        # All are compared, so that the time does not tell which one was nearly right.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if not any(matches):
            raise ApiError(
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return given.decode("latin-1")


def build_app(served: Served, keys: Sequence[str]) -> ASGIApp:
    """The application."""
    client = served.client

    async def health(request: Request) -> Response:
        if client.is_over:
            raise ApiError("the engine has stopped, and this server ends", status=503, kind="service_unavailable_error", code="engine_dead")
        return _json({"status": "ok"})

    async def ready(request: Request) -> Response:
        if (why := client.why_not_ready()) is not None:
            raise not_ready(why)
        return _json({"status": "ready"})

    async def version(request: Request) -> Response:
        return _json({"version": importlib.metadata.version("l4jax")})

    async def models(request: Request) -> Response:
        model = {"id": served.name, "object": "model", "created": served.created, "owned_by": "l4jax", "root": served.name}
        return _json({"object": "list", "data": [{**model, "parent": None, "max_model_len": served.longest}]})

    def checked[Body: msgspec.Struct](
        kind: type[Body], others: Any, made: Callable[[Body, Request, str], Any]
    ) -> Callable[[Request], Coroutine[Any, Any, Any]]:
        """Read a request's body and make something of it, off the event loop if it is long."""

        async def act(request: Request) -> Any:
            raw = await _body(request)

            def make() -> Any:
                body = parameters.parsed(raw, kind, others, ignore_unknown=served.ignore_unknown)
                return made(body, request, request.scope["l4jax.id"])

            return await asyncio.to_thread(make) if len(raw) > _INLINE_BYTES else make()

        return act

    def answering[Body: msgspec.Struct](kind: type[Body], others: Any, made: Callable[..., Answers]) -> Endpoint:
        def make(body: Body, request: Request, request_id: str) -> Answers:
            return made(served, body, key=request.scope["l4jax.key"], request_id=request_id)

        parse = checked(kind, others, make)

        async def act(request: Request) -> Answers:
            client.check_room(1)
            answers: Answers = await parse(request)
            return answers

        return Endpoint(act)

    def tokens[Body: msgspec.Struct](kind: type[Body], made: Callable[[Served, Body], dict[str, Any]]) -> Any:
        parse = checked(kind, {}, lambda body, request, request_id: made(served, body))

        async def act(request: Request) -> Response:
            return _json(await parse(request))

        return act

    routes = [
        Route("/health", health),
        Route("/ready", ready),
        Route("/version", version),
        Route("/v1/models", models),
        Route("/tokenize", tokens(TokenizeBody, tokenize), methods=["POST"]),
        Route("/detokenize", tokens(DetokenizeBody, detokenize), methods=["POST"]),
        Route("/v1/completions", answering(CompletionBody, parameters.COMPLETION_OTHERS, Completions), methods=["POST"]),
        Route("/v1/chat/completions", answering(ChatBody, parameters.CHAT_OTHERS, Chat), methods=["POST"]),
    ]
    return Guard(
        Starlette(routes=routes, exception_handlers={404: _no_route, 405: _no_route, ApiError: _refused, Exception: _bug}), Keys(keys)
    )


class Guard:
    """Gives each request an id, and lets in only those with a key and few headers."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            raise RuntimeError(f"the server was asked for {scope['type']}; expected http")
        request_id = _request_id(scope)

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        scope["l4jax.id"], scope["l4jax.key"] = request_id, None
        try:
            if len(scope["headers"]) > MOST_HEADERS:
                raise ApiError(f"the request has {len(scope['headers'])} headers; expected at most {MOST_HEADERS}", status=431)
            if scope["path"] not in OPEN_ROUTES:
                scope["l4jax.key"] = self._keys.found(scope)
        except ApiError as error:
            await _refusal(error)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)


class Endpoint:
    """A route that answers as long as the client is there."""

    def __init__(self, check: Callable[[Request], Coroutine[Any, Any, Answers]]) -> None:
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; what it has begun ends when the client has gone."""
        answers = await self._check(Request(scope, receive))
        work = asyncio.create_task(_stream(answers, send) if answers.streams else _whole(answers, scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Also when the server is told to stop at once.
            answers.close()
            for task in (work, gone):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _whole(answers: Answers, scope: Scope, receive: Receive, send: Send) -> None:
    await _json(await answers.whole())(scope, receive, send)


async def _stream(answers: Answers, send: Send) -> None:
    """Write server-sent events. Nothing is sent until there is something to say: a request that fails at once gets an error's status."""
    chunks = answers.stream()
    started = False

    async def write(body: bytes) -> None:
        nonlocal started
        if not started:
            started = True
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def following() -> list[dict[str, Any]] | None:
        return await anext(chunks, None)

    coming = asyncio.create_task(following())
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=QUIET_SECONDS)
            if not done:
                await write(b": still working\n\n")
                continue
            if (found := coming.result()) is None:
                break
            await write(b"".join(map(_event, found)))
            coming = asyncio.create_task(following())
        await write(b"data: [DONE]\n\n")
    except ApiError as error:
        if not started:
            raise
        await write(_event(error.fields))
    finally:
        coming.cancel()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(fields: Any) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


async def _body(request: Request) -> bytes:
    """A request's body. Raises ApiError for one that is too long, or too slow."""
    too_long = ApiError(f"the body has more than {MOST_BODY_BYTES} bytes; send less", status=413, code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > MOST_BODY_BYTES:
        raise too_long
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > MOST_BODY_BYTES:
                    raise too_long
    except TimeoutError:
        raise ApiError(f"the body did not arrive in {BODY_SECONDS:.0f} s; send it faster", status=408, code="body_too_slow") from None
    return b"".join(parts)


def _request_id(scope: Scope) -> str:
    """The client's ``x-request-id`` if it is short and printable, or a new one."""
    given: bytes = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    if 0 < len(given) <= 128 and all(32 < byte < 127 for byte in given):
        return given.decode()
    return f"req-{secrets.token_hex(12)}"


def _json(fields: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(fields), status, media_type="application/json")


def _refusal(error: ApiError) -> Response:
    return Response(error.body, error.status, error.headers, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _refusal(error)


async def _no_route(request: Request, error: Exception) -> Response:
    status: int = getattr(error, "status_code", 404)
    path = request.url.path[:100]
    return _refusal(
        ApiError(f"there is no {request.method} {path} here; docs/serving.md lists the routes", status=status, code="not_found")
    )


async def _bug(request: Request, error: Exception) -> Response:
    LOGGER.error("request %s failed", request.scope["l4jax.id"])  # the server logs the error itself
    return _refusal(
        ApiError(f"an unexpected error; the server's log has it as {request.scope['l4jax.id']}", status=500, kind="server_error")
    )

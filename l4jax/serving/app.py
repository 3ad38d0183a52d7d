"""The HTTP application: routes, keys, limits on what is read, and how answers are written."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import importlib.metadata
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from l4jax.decoding.guide import Guide
from l4jax.serving import errors, parameters
from l4jax.serving.api.chat import Chat, ChatBody
from l4jax.serving.api.completions import CompletionBody, Completions
from l4jax.serving.api.message_bodies import parsed_messages, parsed_token_count
from l4jax.serving.api.messages import Messages, count_tokens
from l4jax.serving.api.responses import Responses, ResponsesBody
from l4jax.serving.api.served import Served
from l4jax.serving.api.tokens import DetokenizeBody, TokenizeBody, detokenize, tokenize
from l4jax.serving.dialects import dialect_of
from l4jax.serving.engine_client import EngineClient
from l4jax.serving.errors import ApiError, engine_stopped
from l4jax.serving.generation import Generation
from l4jax.serving.guide_checker import GuideChecker
from l4jax.serving.log import RequestLog
from l4jax.serving.metrics import CONTENT_TYPE, Metrics
from l4jax.serving.page import PATH as PAGE_PATH
from l4jax.serving.page import page_route

LOGGER = logging.getLogger("l4jax.serving")
MAX_BODY_BYTES = 16 << 20
MAX_BODIES_BYTES = 256 << 20
"""Of all bodies that are being read."""
BODY_SECONDS = 30.0
"""How long a body may take to arrive."""
QUIET_SECONDS = 15.0
"""After this long without a chunk a stream gets a comment: proxies end connections that are silent."""
MAX_HEADERS = 100
_ID_HEADERS = (b"x-request-id", b"request-id")
"""OpenAI's and Anthropic's."""
_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
OPEN_ROUTES = (PAGE_PATH, "/health", "/ready")
_THREADS = 2
_INLINE_BYTES = 16 << 10
"""Larger bodies are read and tokenised in a thread, so that other streams go on."""


class GenerationRequest(Protocol):
    """A checked request of one of the APIs, which can compute its answer."""

    streams: bool
    answers: int
    """How many it asks for."""
    guided: tuple[Guide, str] | None
    """What they must look like, which is not checked yet, and the parameter that says so."""
    generation: Generation

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""

    def stream(self) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer as chunks; those that came together are one list."""


class Reads[Body](Protocol):
    """A function that reads a body."""

    def __call__(self, raw: bytes, *, ignore_unknown: bool) -> Body:
        """Raises ApiError for one that is no request."""


class Keys:
    """The API keys; without any, everybody is let in."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def key_of(self, scope: Scope) -> str | None:
        """The key of a request; None if none is needed. Raises ApiError for a wrong or missing one."""
        if not self._keys:
            return None
        headers = dict(scope["headers"])
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        # All keys are compared, so that the time does not tell which one matched.
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


def build_app(served: Served, keys: Sequence[str], log: RequestLog | None = None, *, page: bool = True) -> ASGIApp:
    """The application: routes, error handlers, the check of API keys, and the log of requests if there is one.

    ``page``: whether it has the page to chat with.
    """
    client, bodies = served.client, Bodies()
    threads, guides = ThreadPoolExecutor(_THREADS), GuideChecker()

    async def health(request: Request) -> Response:
        if client.is_over:
            raise engine_stopped()
        return _json({"status": "ok"})

    async def ready(request: Request) -> Response:
        if (error := client.why_not_ready()) is not None:
            raise error
        return _json({"status": "ready"})

    async def version(request: Request) -> Response:
        return _json({"version": importlib.metadata.version("l4jax")})

    async def metrics(request: Request) -> Response:
        return Response(served.metrics.text(), media_type=CONTENT_TYPE)

    async def models(request: Request) -> Response:
        model = {"id": served.name, "object": "model", "created": served.created, "owned_by": "l4jax", "root": served.name}
        return _json({"object": "list", "data": [{**model, "parent": None, "max_model_len": served.max_model_len}]})

    def reader[Body: msgspec.Struct](body_type: type[Body], not_honoured: Mapping[str, parameters.Parameter]) -> Reads[Body]:
        return functools.partial(parameters.parsed, kind=body_type, not_honoured=not_honoured)

    def parser[Body: msgspec.Struct](
        read: Reads[Body], handle: Callable[[Body, Request], Any]
    ) -> Callable[[Request], Coroutine[Any, Any, Any]]:
        """Returns a function that parses a request's body and passes it to ``handle``; long bodies in a thread."""

        async def parse(request: Request) -> Any:
            length = request.headers.get("content-length", "0")
            if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
                raise _too_long()
            async with bodies.read(request) as raw:

                def handled() -> Any:
                    return handle(read(raw, ignore_unknown=served.ignore_unknown), request)

                is_long = len(raw) > _INLINE_BYTES
                return await asyncio.get_running_loop().run_in_executor(threads, handled) if is_long else handled()

        return parse

    def generates[Body: msgspec.Struct](read: Reads[Body], api: Callable[..., GenerationRequest]) -> Endpoint:
        def handle(body: Body, request: Request) -> GenerationRequest:
            made = api(served, body, key=request.scope["l4jax.key"], request_id=request.scope["l4jax.id"])
            request.scope["l4jax.generation"] = made.generation
            return made

        parse = parser(read, handle)

        async def check(request: Request) -> GenerationRequest:
            client.check_room(1)
            checked: GenerationRequest = await parse(request)
            return checked

        return Endpoint(client, guides, check)

    def converts[Body: msgspec.Struct](read: Reads[Body], api: Callable[[Served, Body], dict[str, Any]]) -> Any:
        parse = parser(read, lambda body, request: api(served, body))

        async def convert(request: Request) -> Response:
            return _json(await parse(request))

        return convert

    completion_body = reader(CompletionBody, parameters.COMPLETION_NOT_HONOURED)
    routes = [
        Route("/health", health),
        Route("/ready", ready),
        Route("/version", version),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/tokenize", converts(reader(TokenizeBody, {}), tokenize), methods=["POST"]),
        Route("/detokenize", converts(reader(DetokenizeBody, {}), detokenize), methods=["POST"]),
        Route("/v1/completions", generates(completion_body, Completions), methods=["POST"]),
        Route("/v1/chat/completions", generates(reader(ChatBody, parameters.CHAT_NOT_HONOURED), Chat), methods=["POST"]),
        Route("/v1/responses", generates(reader(ResponsesBody, parameters.RESPONSES_NOT_HONOURED), Responses), methods=["POST"]),
        Route("/v1/messages", generates(parsed_messages, Messages), methods=["POST"]),
        Route("/v1/messages/count_tokens", converts(parsed_token_count, count_tokens), methods=["POST"]),
    ]
    if page:
        routes.append(page_route())
    handlers = {404: _on_no_route, 405: _on_no_route, ApiError: _on_api_error, ClientDisconnect: _on_disconnect, Exception: _on_bug}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, Keys(keys), served.metrics, log, [route.path for route in routes])


class Guard:
    """Gives each request an id, lets in only requests with a key and few headers, and counts and logs the responses."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics, log: RequestLog | None, routes: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._log = log
        self._routes = routes
        # A server without the page answers its path like any other that no route has.
        self._open = {*OPEN_ROUTES}.intersection(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            raise RuntimeError(f"the server was asked for {scope['type']}; expected http")
        request_id, began = _request_id(scope), time.monotonic()
        status: int | None = None

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *((name, request_id.encode()) for name in _ID_HEADERS)]
                # Other paths are of the client's choice, and could be any number.
                self._metrics.responded(scope["path"] if scope["path"] in self._routes else "other", message["status"])
            await send(message)

        scope["l4jax.id"], scope["l4jax.key"] = request_id, None
        try:
            await self._answer(scope, receive, send_with_id)
        finally:
            if self._log is not None and scope["path"] not in self._open:
                generation: Generation | None = scope.get("l4jax.generation")
                found = {} if generation is None else generation.summary(texts=self._log.texts)
                seconds = round(time.monotonic() - began, 4)
                self._log.write({"id": request_id, "path": scope["path"][:100], "status": status, "seconds": seconds, **found})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if len(scope["headers"]) > MAX_HEADERS:
                raise _closing(f"the request has {len(scope['headers'])} headers; expected at most {MAX_HEADERS}; send fewer", 431, None)
            if scope["path"] not in self._open:
                scope["l4jax.key"] = self._keys.key_of(scope)
        except ApiError as error:
            await _error_response(error, scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class Endpoint:
    """A route that cancels its work when the client disconnects."""

    def __init__(
        self, client: EngineClient, guides: GuideChecker, check: Callable[[Request], Coroutine[Any, Any, GenerationRequest]]
    ) -> None:
        self._client = client
        self._guides = guides
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; what it has begun ends when the client has gone."""
        try:
            answers = await self._check(Request(scope, receive))
        except asyncio.CancelledError:
            if self._client.closing is None:
                raise
            return
        work = asyncio.create_task(self._answer(answers, scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if self._client.closing is None:
                raise
            # The server ends at once, and nobody is to be told.
        finally:
            for task in (work, gone):
                task.cancel()
            try:
                with contextlib.suppress(asyncio.CancelledError):
                    await work
            finally:
                answers.generation.close()  # Python ends a generator that nobody reads any more at a time of its own

    async def _answer(self, answers: GenerationRequest, scope: Scope, receive: Receive, send: Send) -> None:
        if answers.guided is not None:
            await self._guides.check(*answers.guided)
        self._client.check_room(answers.answers)
        await (_stream(answers, scope, send) if answers.streams else _whole(answers, scope, receive, send))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _whole(answers: GenerationRequest, scope: Scope, receive: Receive, send: Send) -> None:
    await _json(await answers.whole())(scope, receive, send)


async def _stream(answers: GenerationRequest, scope: Scope, send: Send) -> None:
    """Write server-sent events. Nothing is sent until there is something to say: a request that fails at once gets an error's status."""
    chunks, dialect = answers.stream(), dialect_of(scope["path"])
    started, written_at = False, time.monotonic()

    async def write(body: bytes) -> None:
        nonlocal started, written_at
        written_at = time.monotonic()
        if not started:
            started = True
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def following() -> list[dict[str, Any]] | None:
        return await anext(chunks, None)

    coming = asyncio.create_task(following())
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=written_at + QUIET_SECONDS - time.monotonic())
            if not done:
                await write(b": still working\n\n")
                continue
            if (found := coming.result()) is None:
                break
            await write(b"".join(map(dialect.event, found)))
            coming = asyncio.create_task(following())
        await write(dialect.end)
    except ApiError as error:
        if not started:
            raise
        await write(dialect.event(dialect.error(error, scope["l4jax.id"])))
    finally:
        coming.cancel()
        with contextlib.suppress(asyncio.CancelledError, ApiError):
            await coming  # what is still being computed ends
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Bodies:
    """Reads requests' bodies, up to a number of bytes of all together."""

    def __init__(self) -> None:
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """A request's body, which takes room until the context ends.

        Raises ApiError for one that is too long or too slow, and if there is no room for it.
        """
        held, parts = 0, []
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    async for part in request.stream():
                        parts.append(part)
                        held += len(part)
                        self._held += len(part)
                        if held > MAX_BODY_BYTES:
                            raise _too_long()
                        if self._held > MAX_BODIES_BYTES:
                            raise errors.queue_full(1, 0)
            except TimeoutError:
                raise _closing(f"the body did not arrive in {BODY_SECONDS:.0f} s; send it faster", 408, "body_too_slow") from None
            yield b"".join(parts)
        finally:
            self._held -= held


def _closing(message: str, status: int, code: str | None) -> ApiError:
    """An error that is sent before the request was read: its connection is not used for another one."""
    return ApiError(message, status=status, code=code, headers={"connection": "close"})


def _too_long() -> ApiError:
    return _closing(f"the body has more than {MAX_BODY_BYTES} bytes; send less", 413, "body_too_large")


def _request_id(scope: Scope) -> str:
    """The client's ``x-request-id`` if it is short and printable, or a new one."""
    given: bytes = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    if 0 < len(given) <= 128 and all(32 < byte < 127 for byte in given):
        return given.decode()
    return f"req-{secrets.token_hex(12)}"


def _json(fields: Any) -> Response:
    return Response(msgspec.json.encode(fields), media_type="application/json")


def _error_response(error: ApiError, scope: Scope) -> Response:
    body = msgspec.json.encode(dialect_of(scope["path"]).error(error, scope["l4jax.id"]))
    return Response(body, error.status, error.headers, media_type="application/json")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error, request.scope)


async def _on_no_route(request: Request, error: Exception) -> Response:
    status: int = getattr(error, "status_code", 404)
    path = request.url.path[:100]
    error = ApiError(f"there is no {request.method} {path} here; docs/serving.md lists the routes", status=status, code="not_found")
    return _error_response(error, request.scope)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _on_bug(request: Request, error: Exception) -> Response:
    request_id = request.scope["l4jax.id"]
    LOGGER.error("request %s failed", request_id)  # uvicorn logs the exception
    error = ApiError(f"request {request_id} failed by a fault of the server, whose log has it", status=500, kind="server_error")
    return _error_response(error, request.scope)

"""The HTTP application without an engine: keys, limits, and answers to what is no request."""

from __future__ import annotations

import asyncio

import pytest
from starlette.routing import Route

from l4jax.serving import app as app_module
from l4jax.serving import front
from l4jax.serving.api import completions
from l4jax.serving.api.served import Defaults, scope_of
from l4jax.serving.app import MAX_BODY_BYTES, OPEN_ROUTES, build_app
from l4jax.serving.engine_client import EngineClient, Inbox
from l4jax.serving.errors import ApiError
from l4jax.serving.generation import error_of
from l4jax.serving.messages import News
from tests.serving.running import call

CHAT = "/v1/chat/completions"
BODY = b'{"messages": [{"role": "user", "content": "hi"}]}'


def routes(app):
    return [(route.path, next(iter(route.methods - {"HEAD"}))) for route in app._app.routes if isinstance(route, Route)]


WRONG = [[], [(b"authorization", b"Bearer wrong")], [(b"authorization", b"Bearer secre")], [(b"authorization", b"secret")]]
WRONG += [[(b"x-api-key", b"")], [(b"x-api-key", b"\xff")], [(b"authorization", b"Basic secret")]]


@pytest.mark.parametrize("headers", WRONG, ids=str)
def test_every_route_but_three_needs_a_key(served, headers):
    app = build_app(served, ["secret", "another"])
    found = {path: call(app, path, method=method, headers=headers, parts=[BODY])[0] for path, method in routes(app)}
    assert len(found) >= 8 and CHAT in found
    assert {path for path, status in found.items() if status != 401} == set(OPEN_ROUTES)
    assert call(app, "/nothing", headers=headers)[0] == 401


@pytest.mark.parametrize("header", [(b"authorization", b"Bearer another"), (b"authorization", b"bearer secret"), (b"x-api-key", b"secret")])
def test_either_key_lets_in(served, header):
    app = build_app(served, ["secret", "another"])
    assert call(app, "/v1/models", headers=[header])[0] == 200
    assert call(build_app(served, []), "/v1/models")[0] == 200


def test_keys_and_salts_share_no_prefixes():
    scopes = [scope_of(key, salt) for key in (None, "a", "b") for salt in (None, "a", "b")]
    assert len(set(scopes)) == len(scopes) and scope_of(None, None) == b""


def test_before_the_engine_is_ready_requests_are_refused(served):
    status, headers, answer = call(build_app(served, []), CHAT, method="POST", parts=[BODY])
    assert (status, answer["error"]["code"], headers[b"retry-after"]) == (503, "not_ready", b"1")
    assert call(build_app(served, []), "/ready")[0] == 503 and call(build_app(served, []), "/health")[0] == 200


def test_long_and_slow_bodies_are_refused(served, monkeypatch):
    app = build_app(served, [])
    long = [b"x" * (MAX_BODY_BYTES // 2)] * 3
    assert call(app, "/tokenize", method="POST", parts=long)[2]["error"]["code"] == "body_too_large"
    told = [(b"content-length", str(MAX_BODY_BYTES + 1).encode())]
    assert call(app, "/tokenize", method="POST", headers=told)[0] == 413
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.05)
    assert call(app, "/tokenize", method="POST", parts=[b"{", b"}"], delay=0.1)[0] == 408


def test_requests_that_no_route_answers(served):
    app = build_app(served, [])
    for path, method, expected in (("/nothing", "GET", 404), (CHAT, "GET", 405), ("/v1/embeddings", "POST", 404)):
        status, _, answer = call(app, path, method=method)
        assert status == expected and path in answer["error"]["message"]
    assert call(app, "/health", headers=[(b"x-%d" % i, b"") for i in range(101)])[0] == 431
    long = call(app, "/health", headers=[(b"x-request-id", b"a" * 129)])[1][b"x-request-id"]
    assert long.startswith(b"req-")


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/tokenize", b'{"prompt": "\\ud800"}', 400),
        ("/tokenize", b'{"prompt": "a", "messages": []}', 400),
        ("/tokenize", b"{}", 400),
        ("/tokenize", b'{"prompt": "a", "model": "other"}', 404),
        ("/detokenize", b'{"tokens": [-1]}', 400),
        ("/detokenize", b'{"tokens": [99999999999999999999]}', 400),
        ("/detokenize", b'{"tokens": [true]}', 400),
        ("/detokenize", b'{"tokens": [' + b",".join([b"1"] * 300) + b"]}", 400),
    ],
)
def test_texts_and_tokens_that_the_model_does_not_have(served, path, body, expected):
    status, _, answer = call(build_app(served, []), path, method="POST", parts=[body])
    assert status == expected, answer
    assert "\n" not in answer["error"]["message"]


class Slow:
    """A request whose chunks come when they do."""

    streams, answers = True, 1

    def __init__(self, *chunks):
        self.chunks = chunks

    async def stream(self):
        for seconds, chunk in self.chunks:
            await asyncio.sleep(seconds)
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk


def streamed(request, path=CHAT):
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(app_module._stream(request, {"path": path, "l4jax.id": "r"}, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def test_a_silent_stream_gets_comments(monkeypatch):
    monkeypatch.setattr(app_module, "QUIET_SECONDS", 0.1)
    status, body = streamed(Slow((0.25, [{"a": 1}]), (0.0, [{"a": 2}, {"a": 3}]), (0.15, [{"a": 4}])))
    assert status == 200
    lines = body.decode().split("\n\n")
    assert lines == [": still working"] * 2 + [f'data: {{"a":{n}}}' for n in (1, 2, 3)] + [
        ": still working",
        'data: {"a":4}',
        "data: [DONE]",
        "",
    ]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_events_may_have_names_and_the_last_may_say_so_itself(path):
    _, body = streamed(Slow((0, [{"type": "begin"}, {"type": "end"}])), path)
    assert body.decode() == 'event: begin\ndata: {"type":"begin"}\n\nevent: end\ndata: {"type":"end"}\n\n'


def test_a_streams_error_has_a_status_before_the_first_event_and_is_the_last_one_after():
    error = ApiError("no", code="bad")
    with pytest.raises(ApiError):
        streamed(Slow((0, error)))
    _, body = streamed(Slow((0, [{"a": 1}]), (0, error)))
    assert body.decode().split("\n\n") == [
        'data: {"a":1}',
        'data: {"error":{"message":"no","type":"invalid_request_error","param":null,"code":"bad"}}',
        "",
    ]


def test_an_error_after_a_comment_has_the_form_of_its_api(monkeypatch):
    """Nothing of the answer has come, and yet the status has been sent."""
    monkeypatch.setattr(app_module, "QUIET_SECONDS", 0.1)
    last = {}
    for path in (CHAT, "/v1/responses", "/v1/messages"):
        _, body = streamed(Slow((0.25, ApiError("no", code="bad"))), path)
        comment, *_, event, end = body.decode().split("\n\n")
        assert comment.startswith(":") and end == ""
        last[path] = event
    assert last["/v1/responses"] == 'event: error\ndata: {"type":"error","sequence_number":0,"code":"bad","message":"no","param":null}'
    assert last["/v1/messages"].startswith('event: error\ndata: {"type":"error","error":{"type":"invalid_request_error"')
    assert last[CHAT].startswith('data: {"error":')


def test_errors_of_the_engine():
    kinds = {"bad_request": 400, "not_finite": 500, "failed": 500, "closing": 503}
    found = {kind: error_of(News(1, over=True, error="why", error_kind=kind), "req-1") for kind in kinds}
    assert {kind: error.status for kind, error in found.items()} == kinds
    assert [kind for kind, error in found.items() if error.headers.get("x-should-retry") == "false"] == ["not_finite"]
    assert "req-1" in found["not_finite"].message


def test_a_fault_of_the_server_is_logged_and_not_shown(served, monkeypatch):
    def fails(*_):
        raise KeyError("/secret/path")

    monkeypatch.setattr(app_module, "detokenize", fails)
    answers = []

    async def sent(message):
        answers.append(message)

    with pytest.raises(KeyError):  # uvicorn logs it
        call(build_app(served, []), "/detokenize", method="POST", parts=[b'{"tokens": []}'], sent=sent)
    assert answers[0]["status"] == 500 and b"secret" not in answers[1]["body"] and b"req-" in answers[1]["body"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [("{}", (1.0, 1.0)), ('{"temperature": 0.6, "top_p": 0.9, "top_k": 5}', (0.6, 0.9)), ('{"temperature": null}', (1.0, 1.0))],
)
def test_the_checkpoints_sampling_settings_are_the_defaults(tmp_path, content, expected):
    path = tmp_path / "generation_config.json"
    assert front._defaults(path) == Defaults()
    path.write_text(content)
    assert front._defaults(path) == Defaults(*expected)


def test_wrong_sampling_settings_of_a_checkpoint_are_refused(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text('{"top_p": 7}')
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p is 7.*--generation-config none"):
        front._defaults(path)


def test_more_scored_tokens_than_the_limit_are_refused(served, monkeypatch):
    monkeypatch.setattr(completions, "MAX_SCORED_TOKENS", 11)
    body = completions.CompletionBody(prompt=[[60] * 3, [60] * 3], n=2, echo=True, logprobs=1, max_tokens=0)
    with pytest.raises(ApiError, match="12 prompt tokens"):
        completions.Completions(served, body, key=None, request_id="r")
    body.n = 1
    assert completions.Completions(served, body, key=None, request_id="r").answers == 2


def test_requests_that_begin_after_the_end_end_at_once(served):
    async def run():
        client = EngineClient(None, max_waiting=1, stalled_seconds=30)
        client.closing = "bye"
        client.end_all()
        inbox = Inbox()
        client.score([1, 2], 0, inbox)
        return await asyncio.wait_for(inbox.take(), 5)

    (news,) = asyncio.run(run())
    assert news.over and news.error == "bye" and error_of(news, "r").status == 503


def test_an_api_key_scopes_the_prefix_cache(served):
    body = completions.CompletionBody(prompt=[60, 61])
    scopes = {key: completions.Completions(served, body, key=key, request_id="r").generation.requests[0].scope for key in (None, "a", "b")}
    assert len(set(scopes.values())) == 3 and scopes[None] == b""

"""What a hostile or broken client sends: the answer is an error, and others are served meanwhile."""

from __future__ import annotations

import json
import socket
import time

import pytest

from tests.serving.running import CONTEXT

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def raw(server, sent: bytes, *, seconds: float = 30) -> bytes:
    """Everything that the server answers to these bytes."""
    with socket.create_connection((server.host, server.port), timeout=seconds) as connection:
        for start in range(0, len(sent), 1 << 16):
            try:
                connection.sendall(sent[start : start + (1 << 16)])
            except ConnectionError:
                break
        found = b""
        try:
            while part := connection.recv(1 << 16):
                found += part
        except ConnectionError:
            pass
        return found


MESSAGE = {"role": "user", "content": "hi"}
BODIES = [
    {"n": 10**9},
    {"n": -1},
    {"max_tokens": 10**30},
    {"max_tokens": -5},
    {"seed": 10**400, "temperature": 10**400},
    {"top_logprobs": 10**9, "logprobs": True},
    {"stop": ["x"] * 100_000},
    {"stop": ["x" * 2000]},
    {"stop": [""]},
    {"stop_token_ids": list(range(1000))},
    {"stop_token_ids": [-1]},
    {"logit_bias": {str(token): 1 for token in range(5000)}},
    {"logit_bias": {"-1": 1}},
    {"logit_bias": {"1": 1e9}},
    {"top_p": 0},
    {"min_p": 1},
    {"repetition_penalty": -1},
    {"messages": []},
    {"messages": [MESSAGE] * 5000},
    {"messages": [{"role": "user", "content": "x" * 1_000_000}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": [1]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{}]}, MESSAGE]},
    {"chat_template_kwargs": {"messages": []}},
    {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    {"stream_options": {"include_usage": True}},
    {"x" * 100_000: 1},
]


@pytest.mark.parametrize("fields", BODIES, ids=lambda fields: str(fields)[:40])
def test_values_out_of_range_are_refused_at_once(server, checkpoint, fields):
    began = time.monotonic()
    status, answer = server.answer(CHAT, {"messages": [MESSAGE], **fields})
    assert status == 400, answer
    text = json.dumps(answer)
    assert len(text) < 1000 and "\\n" not in text and str(checkpoint) not in text and "Traceback" not in text
    assert time.monotonic() - began < 5


def test_errors_do_not_name_the_checkpoints_folder(server, checkpoint):
    status, answer = server.answer(CHAT, {"messages": [MESSAGE], "chat_template_kwargs": {"foo": 1}})
    assert status == 400 and "foo" in answer["error"]["message"] and str(checkpoint) not in answer["error"]["message"]


@pytest.mark.parametrize("depth", [60, 64, 65, 500, 992, 993, 994, 995, 996, 1000, 5000])
def test_nested_messages_are_answered_or_refused(server, depth):
    body = b'{"messages": [{"role": "user", "content": "hi", "z": %s}], "max_tokens": 1}' % (b'{"a":' * depth + b"1" + b"}" * depth)
    assert server.answer(CHAT, body)[0] in (200, 400)


@pytest.mark.parametrize(
    "prompt", [[], [[]], [1.5], [True], [[1, "a"]], [None], {"a": 1}, [-1], [10**9], "", [""], ["a"] * 65, [1] * CONTEXT]
)
def test_wrong_prompts_are_refused(server, prompt):
    status, answer = server.answer(COMPLETIONS, {"prompt": prompt, "max_tokens": 1})
    assert (status, answer["error"].get("param")) in ((400, "prompt"), (400, None)), answer


def test_negative_lengths_and_prompts_that_fill_the_context(server):
    for max_tokens in (-1, 0):
        status, answer = server.answer(COMPLETIONS, {"prompt": "a", "max_tokens": max_tokens})
        assert status == 400 and "max_tokens" in answer["error"]["message"]
    status, answer = server.answer(COMPLETIONS, {"prompt": "a", "max_tokens": -1, "echo": True})
    assert status == 400 and "max_tokens" in answer["error"]["message"]
    _, answer = server.answer(COMPLETIONS, {"prompt": [60] * (CONTEXT - 3), "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 3
    status, answer = server.answer(CHAT, {"messages": [MESSAGE], "max_completion_tokens": CONTEXT})
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "max_completion_tokens", "context_length_exceeded")


def test_long_headers_end_the_connection(server):
    found = raw(server, b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"a" * (1 << 20) + b"\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 431 ") or found == b""  # a reset may lose the answer
    assert b" 200 " not in found
    assert server.answer("/health")[0] == 200


def test_what_is_no_http_is_refused(server):
    assert b" 400 " in raw(server, b"\x00\x01\x02\r\n\r\n").split(b"\r\n")[0]
    assert server.answer("/health")[0] == 200


def test_an_offer_of_http_2_is_ignored(server):
    """curl --http2 and Java's client make it; the body must reach the request."""
    body = json.dumps({"messages": [MESSAGE], "max_tokens": 1}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings, close\r\nupgrade: h2c\r\nhttp2-settings: A\r\n"
    found = raw(server, head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
    assert found.startswith(b"HTTP/1.1 200 ") and b"chat.completion" in found


def test_pipelined_requests_are_answered_in_turn(server):
    one = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    last = b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    found = raw(server, one * 3 + last)
    assert found.count(b"HTTP/1.1 200 ") == 4 and found.rstrip().endswith(b'"}') and b"version" in found.split(b"\r\n\r\n")[-1]


def test_a_trailing_slash_is_not_redirected(server):
    status, answer = server.answer(CHAT + "/", {"messages": [MESSAGE]})
    assert status == 404 and answer["error"]["code"] == "not_found"


def test_a_body_that_breaks_off_is_no_fault_of_the_server(server):
    with socket.create_connection((server.host, server.port), timeout=30) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{".encode())
    assert server.answer("/health")[0] == 200


def test_trailers_are_dropped_and_limited(server):
    head = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"
    assert b" 200 " in raw(server, head + b"x-request-id: trailer\r\n\r\n")
    began = time.monotonic()
    found = raw(server, head.replace(b"close", b"keep-alive") + b"a: 1\r\n" * (4 << 20))
    assert found.count(b" 200 ") <= 1 and time.monotonic() - began < 20  # 24 MB: the connection was closed before the end
    assert server.answer("/health")[0] == 200


def test_an_upgrade_that_is_missed_is_refused_and_not_misread(server):
    """Its header begins a new packet, so it cannot be seen for what it is."""
    body = json.dumps({"messages": [MESSAGE], "max_tokens": 1}).encode()
    with socket.create_connection((server.host, server.port), timeout=30) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\n".encode())
        time.sleep(0.2)
        connection.sendall(b"upgrade: h2c\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400 ")


def test_a_long_body_that_waits_ends_the_connection(server):
    one = json.dumps({"messages": [MESSAGE], "ignore_eos": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    found = raw(server, (head % len(one)).encode() + one + (head % (1 << 20)).encode() + b" " * (1 << 20))
    assert found == b""
    assert server.answer(CHAT, {"messages": [MESSAGE], "max_tokens": 1})[0] == 200

"""Anthropic's Messages API."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re

import msgspec
import pytest

from l4jax.serving import app as app_module
from l4jax.serving.api.chat import prompt_of
from l4jax.serving.api.message_bodies import parsed_messages, parsed_token_count
from l4jax.serving.api.messages import Messages
from l4jax.serving.app import MAX_BODY_BYTES, build_app
from l4jax.serving.dialects import Anthropic
from l4jax.serving.errors import ApiError
from l4jax.serving.generation import Piece
from l4jax.text.chat import ChatFormat
from l4jax.text.load import Text
from tests.serving.message_requests import ASKED, TIME, WEATHER, asked
from tests.serving.running import call

ROUTE, COUNT, CHAT = "/v1/messages", "/v1/messages/count_tokens", "/v1/chat/completions"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def streamed(server, body):
    """The events of a stream, each with its name."""
    connection, response = server.open("POST", ROUTE, {**body, "stream": True})
    with contextlib.closing(connection):
        assert response.status == 200, response.read()
        return events(response.read().decode())


def events(text):
    found = []
    for item in text.removesuffix("\n\n").split("\n\n"):
        name, data = item.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def joined(items):
    """What a client makes of a stream's events: a whole message. Checks their order."""
    first, *rest, delta, last = items
    assert (first["type"], delta["type"], last["type"]) == ("message_start", "message_delta", "message_stop")
    message = first["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    inputs, is_open = {}, False
    for item in rest:
        match item["type"]:
            case "content_block_start":
                assert not is_open and item["index"] == len(message["content"])
                message["content"].append(item["content_block"])
                is_open = True
            case "content_block_delta":
                assert is_open and item["index"] == len(message["content"]) - 1
                change = item["delta"]
                if change["type"] == "text_delta":
                    message["content"][-1]["text"] += change["text"]
                else:
                    assert change["type"] == "input_json_delta"
                    inputs[item["index"]] = inputs.get(item["index"], "") + change["partial_json"]
            case "content_block_stop":
                assert is_open and item["index"] == len(message["content"]) - 1
                is_open = False
    assert not is_open
    for index, text in inputs.items():
        with contextlib.suppress(ValueError):
            message["content"][index]["input"] = json.loads(text)
    return {**message, **delta["delta"], "usage": {**message["usage"], **delta["usage"]}}


def without_ids(message):
    content = [{key: value for key, value in block.items() if key != "id"} for block in message["content"]]
    return {**message, "id": "", "content": content, "usage": message["usage"]["output_tokens"]}


def total(usage):
    return usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]


def test_a_message_is_what_a_chat_says(server):
    _, chat = server.answer(CHAT, asked())
    status, answer = server.answer(ROUTE, asked(model="tiny"))
    assert status == 200, answer
    assert re.fullmatch(r"msg_[0-9a-f]{32}", answer["id"])
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "tiny")
    assert answer["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"]}]
    assert answer["stop_reason"] == "max_tokens" and answer["stop_sequence"] is None
    assert total(answer["usage"]) == chat["usage"]["prompt_tokens"]
    assert answer["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]


def test_a_streams_events_join_to_the_whole_message(server):
    for more in ({}, {"system": "x"}, {"tools": [WEATHER, TIME], "tool_choice": {"type": "any"}, "max_tokens": 60}):
        _, whole = server.answer(ROUTE, asked(**more))
        items = streamed(server, asked(**more))
        assert without_ids(joined(items)) == without_ids(whole)


def test_the_stop_sequence_that_ends_an_answer_is_reported(server):
    _, free = server.answer(ROUTE, asked(max_tokens=40))
    text = free["content"][0]["text"]
    at = next(at for at in range(3, len(text)) if text.index(text[at : at + 2]) == at)
    stop = text[at : at + 2]
    body = asked(max_tokens=40, stop_sequences=["never", stop])
    _, stopped = server.answer(ROUTE, body)
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", stop)
    assert stopped["content"] == [{"type": "text", "text": text[:at]}]
    assert without_ids(joined(streamed(server, body))) == without_ids(stopped)


def test_cached_tokens_are_not_counted_as_input(server):
    body = asked(messages=[{"role": "user", "content": "the fox and the dog " * 100}])
    _, counted = server.answer(COUNT, {"messages": body["messages"]})
    for _ in range(2):
        _, answer = server.answer(ROUTE, body)
        assert total(answer["usage"]) == counted["input_tokens"]
    assert answer["usage"]["cache_read_input_tokens"] == 512  # a prefill piece
    assert joined(streamed(server, body))["usage"] == answer["usage"]


def test_a_system_text_may_be_in_blocks(server):
    blocks = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief.", "cache_control": {"type": "ephemeral"}}]
    counts = [server.answer(COUNT, {"messages": ASKED, "system": system})[1] for system in ("Be brief.", blocks)]
    _, without = server.answer(COUNT, {"messages": ASKED})
    assert counts[0] == counts[1] and counts[0]["input_tokens"] > without["input_tokens"]


def test_the_last_message_of_the_assistant_is_continued(server):
    messages = [*ASKED, {"role": "assistant", "content": "The dog"}]
    _, chat = server.answer(CHAT, asked(messages=messages, continue_final_message=True))
    _, answer = server.answer(ROUTE, asked(messages=messages))
    assert answer["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"]}]
    assert total(answer["usage"]) == chat["usage"]["prompt_tokens"]
    assert server.answer(COUNT, {"messages": messages})[1] == {"input_tokens": chat["usage"]["prompt_tokens"]}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}], ids=str)
def test_a_call_and_its_result_go_round(server, choice):
    body = asked(tools=[WEATHER], tool_choice=choice, max_tokens=60)
    _, first = server.answer(ROUTE, body)
    (use,) = first["content"]
    assert first["stop_reason"] == "tool_use" and use["type"] == "tool_use" and use["name"] == "get_weather"
    assert re.fullmatch(r"toolu_[0-9a-f]{32}", use["id"])
    assert use["input"]["city"] in ("Paris", "Rome") and 1 <= use["input"]["days"] <= 9
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": [{"type": "text", "text": "rain"}]}
    messages = [*ASKED, {"role": "assistant", "content": first["content"]}, {"role": "user", "content": [result]}]
    status, second = server.answer(ROUTE, asked(messages=messages, tools=[WEATHER]))
    assert status == 200 and total(second["usage"]) > total(first["usage"])


def test_tools_that_are_not_to_be_called_are_not_in_the_prompt(server):
    plain, none, auto = (
        server.answer(COUNT, {"messages": ASKED, **more})[1]["input_tokens"]
        for more in ({}, {"tools": [WEATHER], "tool_choice": {"type": "none"}}, {"tools": [WEATHER], "tool_choice": {"type": "auto"}})
    )
    assert plain == none < auto
    _, answer = server.answer(ROUTE, asked(tools=[WEATHER]))
    assert total(answer["usage"]) == auto


def test_an_output_format_is_kept_to(server):
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    schema["x-guidance"] = {"whitespace_flexible": False}
    body = asked(output_config={"format": {"type": "json_schema", "schema": schema}}, max_tokens=60)
    _, answer = server.answer(ROUTE, body)
    assert json.loads(answer["content"][0]["text"]) == {"a": 1} and answer["stop_reason"] == "end_turn"


def test_messages_are_counted_and_have_an_id(server):
    connection, response = server.open("POST", ROUTE, asked(), {"x-request-id": "mine"})
    with contextlib.closing(connection):
        assert response.getheader("request-id") == response.getheader("x-request-id") == "mine"
        response.read()
    connection, response = server.open("GET", "/metrics")
    with contextlib.closing(connection):
        assert 'l4jax:http_responses_total{model_name="tiny",route="/v1/messages",status="200"}' in response.read().decode()


@pytest.fixture(scope="module")
def chatting(served):
    """A front whose model has a chat template that knows no tools."""
    chat_format = ChatFormat(TEMPLATE, served.tokenizer, origin="test", variables={})
    config = dataclasses.replace(served.config, max_position_embeddings=2048)
    return dataclasses.replace(served, config=config, text=Text(served.tokenizer, chat_format))


# Answers, of which the engine gives the text.


def answering(chatting, texts, reason="stop", stopped_by=None, **body):
    """A request, and the pieces that the engine gives for its answer."""
    made = Messages(chatting, parsed_messages(msgspec.json.encode(asked(**body)), ignore_unknown=False), key=None, request_id="x")

    async def pieces():
        for number, text in enumerate(texts):
            last = number == len(texts) - 1
            yield [Piece(0, text, [], None, reason if last else None, stopped_by if last else None)]

    made.generation.pieces = pieces
    return made


def whole(made):
    return json.loads(msgspec.json.encode(asyncio.run(made.whole())))


def all_events(made):
    async def collected():
        return [Anthropic().event(item) async for items in made.stream() for item in items]

    return events(b"".join(asyncio.run(collected())).decode())


CALLS = '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3.0e1}}; [get_time()]'


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_text_and_calls_are_blocks_in_order(chatting, cut):
    text = f"Let me see. {CALLS}Done."
    texts = [text[at : at + cut] for at in range(0, len(text), cut)]
    items = all_events(answering(chatting, texts, tools=[WEATHER, TIME]))
    message = whole(answering(chatting, texts, tools=[WEATHER, TIME]))
    first, *calls, last = message["content"]
    assert first == {"type": "text", "text": "Let me see. "} and last == {"type": "text", "text": "Done."}
    assert [(block["type"], block["name"], block["input"]) for block in calls] == [
        ("tool_use", "get_weather", {"city": "Paris", "days": 30}),
        ("tool_use", "get_time", {}),
    ]
    assert message["stop_reason"] == "tool_use"
    assert without_ids(joined(items)) == without_ids(message)
    written = [item["delta"].get("partial_json") for item in items if item["type"] == "content_block_delta" and item["index"] == 1]
    assert "".join(written) == '{"city": "Paris", "days": 3.0e1}'
    assert b'"input":{"city": "Paris", "days": 3.0e1}' in msgspec.json.encode(
        asyncio.run(answering(chatting, texts, tools=[WEATHER]).whole())
    )


@pytest.mark.parametrize(
    ("text", "reason", "stopped_by", "expected"),
    [
        ("x", "stop", None, ("end_turn", None)),
        ("x", "length", None, ("max_tokens", None)),
        ("x", "stop", "###", ("stop_sequence", "###")),
        (CALLS, "stop", None, ("tool_use", None)),
        (CALLS, "stop", "###", ("tool_use", None)),
        (CALLS, "length", None, ("max_tokens", None)),
        (CALLS[:50], "length", None, ("max_tokens", None)),
        (CALLS[:50], "stop", None, ("end_turn", None)),
    ],
)
def test_why_an_answer_has_ended(chatting, text, reason, stopped_by, expected):
    message = whole(answering(chatting, [text], reason, stopped_by, tools=[WEATHER, TIME]))
    assert (message["stop_reason"], message["stop_sequence"]) == expected


def test_a_call_that_breaks_off_has_no_input(chatting):
    made = answering(chatting, [CALLS[:50]], "length", tools=[WEATHER])
    (block,) = whole(made)["content"]
    assert block["name"] == "get_weather" and block["input"] == {}
    items = all_events(answering(chatting, [CALLS[:50]], "length", tools=[WEATHER]))
    assert [item["delta"]["partial_json"] for item in items if item["type"] == "content_block_delta"] == ['{"city": "Pa']


def test_a_call_with_a_long_number_is_whole(chatting):
    """Python's own reader of JSON refuses numbers of more than 4,300 digits."""
    text = '{"name": "get_weather", "parameters": {"days": %s}}' % ("1" * 5000)
    made = answering(chatting, [text], tools=[WEATHER])
    answer = asyncio.run(made.whole())
    assert answer["stop_reason"] == "tool_use" and b'"days": 1111' in msgspec.json.encode(answer["content"][0]["input"])


def test_an_answer_of_nothing_has_no_blocks(chatting):
    assert whole(answering(chatting, [""]))["content"] == []
    assert [item["type"] for item in all_events(answering(chatting, [""]))] == ["message_start", "message_delta", "message_stop"]


def test_one_call_if_no_more_are_wanted(chatting):
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    content = whole(answering(chatting, [CALLS], tools=[WEATHER, TIME], tool_choice=choice))["content"]
    assert [block["name"] for block in content] == ["get_weather"]


def test_a_count_is_of_the_same_prompt(chatting):
    body = {"messages": ASKED, "system": "s", "tools": [WEATHER]}
    counted = parsed_token_count(msgspec.json.encode(body), ignore_unknown=False)
    made = answering(chatting, [""], **body)
    assert prompt_of(chatting, counted, counted.checked_tools) == made.generation.requests[0].token_ids


# Errors.


def refused(app, path, expected_kind, status, *, body=b"{}", headers=(), method="POST"):
    found, sent, answer = call(app, path, method=method, headers=headers, parts=[body])
    assert found == status, answer
    assert answer["type"] == "error" and set(answer) == {"type", "error", "request_id"}
    assert set(answer["error"]) == {"type", "message"} and answer["error"]["type"] == expected_kind
    assert answer["request_id"].encode() == sent[b"request-id"] == sent[b"x-request-id"]
    return sent, answer["error"]["message"]


def test_every_error_has_anthropic_s_form(chatting, monkeypatch):
    app, body = build_app(chatting, []), msgspec.json.encode(asked())
    refused(build_app(chatting, ["secret"]), ROUTE, "authentication_error", 401, body=body)
    sent, _ = refused(app, ROUTE, "overloaded_error", 503, body=body)
    assert sent[b"retry-after"] == b"1"
    for path in (ROUTE, COUNT):
        refused(app, path, "not_found_error", 405, method="GET")
    refused(app, f"{ROUTE}/batches", "not_found_error", 404)
    refused(app, ROUTE, "invalid_request_error", 431, headers=[(b"x-%d" % i, b"") for i in range(101)])
    refused(app, COUNT, "request_too_large", 413, headers=[(b"content-length", str(MAX_BODY_BYTES + 1).encode())])
    refused(app, COUNT, "not_found_error", 404, body=msgspec.json.encode({"messages": ASKED, "model": "other"}))
    refused(app, COUNT, "invalid_request_error", 400, body=b"{")
    monkeypatch.setattr(app_module, "MAX_BODIES_BYTES", 1)
    sent, _ = refused(app, COUNT, "rate_limit_error", 429)
    assert sent[b"retry-after"] == b"1"


def test_a_fault_of_the_server_has_anthropic_s_form(chatting, monkeypatch):
    def fails(*_):
        raise KeyError("x")

    monkeypatch.setattr(app_module, "count_tokens", fails)
    answers = []

    async def sent(message):
        answers.append(message)

    with pytest.raises(KeyError):
        call(build_app(chatting, []), COUNT, method="POST", parts=[msgspec.json.encode({"messages": ASKED})], sent=sent)
    assert answers[0]["status"] == 500 and json.loads(answers[1]["body"])["error"]["type"] == "api_error"


def test_an_error_ends_a_stream(chatting):
    made = answering(chatting, ["a"])

    async def pieces():
        yield [Piece(0, "a", [], None, None)]
        raise ApiError("no", status=503)

    made.generation.pieces = pieces
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(app_module._stream(made, {"path": ROUTE, "l4jax.id": "r"}, send))
    found = events(b"".join(message.get("body", b"") for message in sent).decode())
    assert [item["type"] for item in found] == ["message_start", "content_block_start", "content_block_delta", "error"]
    assert found[-1] == {"type": "error", "error": {"type": "overloaded_error", "message": "no"}, "request_id": "r"}

"""OpenAI's Responses API."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json

import pytest

from l4jax.request import TokenLogprob
from l4jax.serving import parameters
from l4jax.serving.api.chat import Chat, ChatBody
from l4jax.serving.api.response_input import messages_of, tools_of
from l4jax.serving.api.responses import Responses, ResponsesBody
from l4jax.serving.errors import ApiError
from l4jax.serving.generation import Piece
from l4jax.text.chat import ChatFormat
from l4jax.text.load import Text
from tests.serving.running import events
from tests.serving.test_tools import CALLS, TEMPLATE
from tests.serving.test_tools import TIME as CHAT_TIME
from tests.serving.test_tools import WEATHER as CHAT_WEATHER

RESPONSES, CHAT = "/v1/responses", "/v1/chat/completions"
WEATHER, TIME = ({"type": "function", **tool["function"]} for tool in (CHAT_WEATHER, CHAT_TIME))
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "fox"]}},
    "required": ["kind"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


def without_ids(value):
    """An answer, but for what differs between two equal ones."""
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: without_ids(item) for key, item in value.items() if key not in ("id", "call_id", "created_at", "completed_at")}


def checked(found):
    """The last response of a stream, whose events must be in order, name their items, and add up to it."""
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    assert all(event["response"]["status"] == "in_progress" and event["response"]["output"] == [] for event in found[:2])
    *middle, last = found[2:]
    items, in_progress = [], False
    for event in middle:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert not in_progress and event["output_index"] == len(items)
            items.append(json.loads(json.dumps(event["item"])))
            in_progress = items[-1]["status"] == "in_progress"
            continue
        item = items[-1]
        assert in_progress and event["output_index"] == len(items) - 1
        assert event.get("item_id", item["id"]) == item["id"]
        match kind:
            case "response.content_part.added":
                assert item["content"] == [] and event["content_index"] == 0
                item["content"].append(event["part"])
            case "response.output_text.delta":
                item["content"][0]["text"] += event["delta"]
                item["content"][0]["logprobs"] += event["logprobs"]
            case "response.output_text.done":
                assert (event["text"], event["logprobs"]) == (item["content"][0]["text"], item["content"][0]["logprobs"])
            case "response.content_part.done":
                assert event["part"] == item["content"][0]
            case "response.function_call_arguments.delta":
                item["arguments"] += event["delta"]
            case "response.function_call_arguments.done":
                assert event["arguments"] == item["arguments"] and event["name"] == item["name"]
            case "response.output_item.done":
                assert event["item"] == item | {"status": event["item"]["status"]}
                items[-1], in_progress = event["item"], False
            case _:
                raise AssertionError(kind)
    assert not in_progress and last["response"]["output"] == items
    assert last["type"] == f"response.{last['response']['status']}" and last["response"]["id"] == found[0]["response"]["id"]
    return last["response"]


def streamed(server, body):
    """The last response of a stream, all of whose events have their names."""
    connection, response = server.open("POST", RESPONSES, {**body, "stream": True})
    with contextlib.closing(connection):
        assert response.status == 200, response.read()
        text = response.read().decode()
    found = events(text)
    names = [line.removeprefix("event: ") for line in text.split("\n") if line.startswith("event: ")]
    assert names == [event["type"] for event in found] and "[DONE]" not in text
    return checked(found)


def test_an_answer_is_that_of_a_chat(server):
    sampled = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "top_logprobs": 2}
    messages = [{"role": "system", "content": "be a dog"}, {"role": "user", "content": "the dog"}]
    _, chat = server.answer(CHAT, {"messages": messages, "max_tokens": 20, "logprobs": True, **sampled})
    body = {"model": "tiny", "instructions": "be a dog", "input": "the dog", "max_output_tokens": 20, "metadata": {"a": "b"}, **LOGPROBS}
    status, answer = server.answer(RESPONSES, body | sampled)
    assert status == 200, answer
    (item,) = answer["output"]
    (choice,) = chat["choices"]
    assert item["type"] == "message" and item["role"] == "assistant" and item["id"].startswith("msg_")
    (part,) = item["content"]
    assert part["text"] == choice["message"]["content"] and part["annotations"] == []
    assert part["logprobs"] == choice["logprobs"]["content"]
    assert answer["id"].startswith("resp_") and answer["object"] == "response" and answer["model"] == "tiny"
    assert (answer["temperature"], answer["top_p"], answer["seed"]) == (0.8, 0.9, 7)
    assert answer["instructions"] == "be a dog" and answer["metadata"] == {"a": "b"} and answer["store"] is False
    assert answer["text"] == {"format": {"type": "text"}} and answer["tools"] == [] and answer["tool_choice"] == "auto"
    usage = chat["usage"]
    assert answer["usage"]["input_tokens"] == usage["prompt_tokens"] and answer["usage"]["output_tokens"] == usage["completion_tokens"]
    assert answer["usage"]["total_tokens"] == usage["total_tokens"]
    assert answer["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}


@pytest.mark.parametrize(
    "more",
    [
        {"max_output_tokens": 24},
        {"max_output_tokens": 24, **LOGPROBS},
        {"tools": [WEATHER, TIME], "tool_choice": "required"},
        {"text": {"format": {"type": "json_schema", "name": "animal", "schema": SCHEMA, "strict": True}}},
    ],
    ids=["text", "logprobs", "call", "schema"],
)
def test_a_stream_gives_the_whole_answer(server, more):
    body = {"input": "the quick brown dog", "temperature": 0, "seed": 1, **more}
    status, whole = server.answer(RESPONSES, body)
    assert status == 200, whole
    last = streamed(server, body)
    assert without_ids(last) == without_ids(whole) | {"usage": last["usage"]}
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_an_answer_that_is_cut_off_is_incomplete(server):
    _, answer = server.answer(RESPONSES, {"input": "the dog", "max_output_tokens": 3, "ignore_eos": True})
    assert answer["status"] == answer["output"][0]["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["usage"]["output_tokens"] == 3 and "completed_at" not in answer
    _, answer = server.answer(RESPONSES, {"input": "the dog", "structured_outputs": {"choice": ["the fox"]}})
    assert answer["status"] == "completed" and answer["incomplete_details"] is None and answer["completed_at"] >= answer["created_at"]
    assert answer["output"][0]["content"][0]["text"] == "the fox"


def test_answers_follow_a_schema(server):
    for form in ({"type": "json_schema", "name": "animal", "schema": SCHEMA}, {"type": "json_object"}):
        _, answer = server.answer(RESPONSES, {"input": "the dog", "text": {"format": form}, "temperature": 2.0, "max_output_tokens": 40})
        text = answer["output"][0]["content"][0]["text"]
        assert text.startswith("{") and answer["text"] == {"format": form}
        if "schema" in form:
            assert json.loads(text)["kind"] in ("dog", "fox")


def test_a_repeated_prompt_is_cached_within_its_salt_only(server):
    body = {"input": "the quick brown fox jumps " * 150, "max_output_tokens": 1}
    cached = [
        server.answer(RESPONSES, {**body, "cache_salt": salt})[1]["usage"]["input_tokens_details"]["cached_tokens"]
        for salt in ("r1", "r1", "r2")
    ]
    assert cached[0] == cached[2] == 0 < cached[1]


@pytest.mark.parametrize("stream", [False, True])
def test_the_items_of_an_answer_go_back_with_the_result_of_a_call(server, stream):
    body = {"input": [{"role": "user", "content": "the dog"}], "tools": [WEATHER], "temperature": 0}
    asked = {**body, "tool_choice": {"type": "function", "name": "get_weather"}}
    first = streamed(server, asked) if stream else server.answer(RESPONSES, asked)[1]
    (call,) = first["output"]
    assert call["type"] == "function_call" and call["name"] == "get_weather" and call["status"] == "completed"
    assert json.loads(call["arguments"])["city"] in ("Paris", "Rome")
    assert first["tool_choice"] == asked["tool_choice"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
    conversation = [*body["input"], *first["output"], result]
    status, second = server.answer(RESPONSES, {**body, "input": conversation, "max_output_tokens": 5})
    assert status == 200, second
    status, third = server.answer(RESPONSES, {**body, "input": [*conversation, *second["output"], *body["input"]], "max_output_tokens": 5})
    assert status == 200, third
    counts = [answer["usage"]["input_tokens"] for answer in (first, second, third)]
    assert counts == sorted(set(counts))
    said = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": _function(call)}]}
    messages = [*body["input"], said, {"role": "tool", "tool_call_id": "1", "content": "rain"}]
    _, chat = server.answer(CHAT, {"messages": messages, "tools": [CHAT_WEATHER], "temperature": 0, "max_tokens": 5})
    assert chat["usage"]["prompt_tokens"] == second["usage"]["input_tokens"]


def _function(call):
    return {"name": call["name"], "arguments": call["arguments"]}


@pytest.fixture(scope="module")
def chatting(served):
    """A front whose model has a chat template that knows no tools."""
    chat_format = ChatFormat(TEMPLATE, served.tokenizer, origin="test", variables={})
    config = dataclasses.replace(served.config, max_position_embeddings=2048)
    return dataclasses.replace(served, config=config, text=Text(served.tokenizer, chat_format))


def asked(chatting, texts, *, error=None, finish_reason="stop", logprobs=None, **body):
    """A request, and the pieces that the engine gives for its answer, or an error after them."""
    made = Responses(chatting, ResponsesBody(input="the dog", **body), key=None, request_id="x")

    async def pieces():
        for number, text in enumerate(texts):
            last = error is None and number == len(texts) - 1
            token_ids = [] if logprobs is None else [5]
            yield [Piece(0, text, token_ids, logprobs, finish_reason if last else None)]
        if error is not None:
            raise error

    made.generation.pieces = pieces
    return made


def stream_of(made):
    async def run():
        return [event async for found in made.stream() for event in found]

    return asyncio.run(run())


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_text_and_calls_are_items_in_their_order(chatting, cut):
    text = f"Let me see. {CALLS} That is all."
    pieces = [text[at : at + cut] for at in range(0, len(text), cut)]
    found = stream_of(asked(chatting, pieces, tools=[WEATHER, TIME], stream=True))
    last = checked(found)
    assert last["status"] == "completed"
    arguments = ['{"city": "Paris", "days": 3}', "{}"]
    assert [
        (item["type"], item.get("name"), item["arguments"] if "arguments" in item else item["content"][0]["text"])
        for item in last["output"]
    ] == [
        ("message", None, "Let me see. "),
        ("function_call", "get_weather", arguments[0]),
        ("function_call", "get_time", arguments[1]),
        ("message", None, "That is all."),
    ]
    assert len({item["id"] for item in last["output"]}) == 4
    for index in (1, 2):
        deltas = [event["delta"] for event in found if event.get("output_index") == index and event["type"].endswith("arguments.delta")]
        assert "".join(deltas) == arguments[index - 1]
    whole = asyncio.run(asked(chatting, pieces, tools=[WEATHER, TIME]).whole())
    assert without_ids(whole["output"]) == without_ids(last["output"])
    # The answer is one message of the assistant when it comes back.
    (message,) = messages_of(None, whole["output"])
    assert message["content"] == "Let me see. That is all."
    assert [_function(call["function"]) for call in message["tool_calls"]] == [_function(item) for item in whole["output"][1:3]]


@pytest.mark.parametrize("more", [{}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_without_tools_a_call_is_text(chatting, more):
    (item,) = asyncio.run(asked(chatting, [CALLS], **more).whole())["output"]
    assert item["content"][0]["text"] == CALLS


def test_one_call_if_no_more_are_wanted(chatting):
    answer = asyncio.run(asked(chatting, [CALLS], tools=[WEATHER, TIME], parallel_tool_calls=False).whole())
    assert [item["name"] for item in answer["output"]] == ["get_weather"] and answer["parallel_tool_calls"] is False


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_a_call_that_breaks_off_is_incomplete(chatting, finish_reason):
    texts = ['{"name": "get_weather", "parameters": {"city": "Pa']
    last = checked(stream_of(asked(chatting, texts, tools=[WEATHER], stream=True, finish_reason=finish_reason)))
    (item,) = last["output"]
    assert item["arguments"] == '{"city": "Pa' and item["status"] == "incomplete"
    assert last["status"] == ("incomplete" if finish_reason == "length" else "completed")


def test_an_empty_answer_is_an_empty_message(chatting):
    last = checked(stream_of(asked(chatting, [""], stream=True)))
    assert [item["content"][0]["text"] for item in last["output"]] == [""] and last["status"] == "completed"


def test_log_probabilities_of_text_that_is_held_back_are_reported(chatting):
    one = [TokenLogprob(-0.5, ())]
    last = checked(stream_of(asked(chatting, ["", "ab"], stream=True, logprobs=one, **LOGPROBS)))
    assert len(last["output"][0]["content"][0]["logprobs"]) == 2


def test_an_error_in_the_stream_is_its_last_event(chatting):
    error = ApiError("the engine has stopped", status=503, kind="server_error", code="engine_stopped")
    last = checked(stream_of(asked(chatting, ["the "], stream=True, error=error)))
    assert last["status"] == "failed" and last["output"][0]["status"] == "incomplete"
    assert last["error"] == {"code": "server_error", "message": "the engine has stopped", "param": None, "type": "server_error"}
    with pytest.raises(ApiError, match="has stopped"):
        stream_of(asked(chatting, [], stream=True, error=error))
    with pytest.raises(ApiError, match="has stopped"):
        asyncio.run(asked(chatting, ["the "], error=error).whole())


def test_items_become_messages():
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "message", "role": "user", "content": "c", "id": "msg_1", "status": "completed"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "x"},
        {"type": "function_call", "id": "fc_1", "call_id": "1", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "", "namespace": None},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "d", "annotations": [], "logprobs": []}], "phase": None},
        {"role": "assistant", "content": "e"},
    ]
    calls = [
        {"id": str(n), "type": "function", "function": {"name": name, "arguments": a}} for n, name, a in ((1, "f", "{}"), (2, "g", ""))
    ]
    assert messages_of("i", items) == [
        {"role": "system", "content": "i"},
        {"role": "system", "content": "ab"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "2", "content": "y"},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "assistant", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    assert messages_of(None, "hi") == [{"role": "user", "content": "hi"}]


def test_prompts_are_those_of_chat(chatting):
    chat = Chat(
        chatting, ChatBody(messages=[{"role": "user", "content": "the dog"}], tools=[CHAT_WEATHER, CHAT_TIME]), key=None, request_id="x"
    )
    made = asked(chatting, [], tools=[{**WEATHER, "strict": None, "defer_loading": False}, TIME], tool_choice="auto")
    assert made.generation.requests[0].token_ids == chat.generation.requests[0].token_ids


USER = {"role": "user", "content": "a"}
F_CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("items", "param", "expected"),
    [
        ([], "input", "no items"),
        ([{"type": "reasoning", "id": "r", "summary": []}], "input", "give a message"),
        ([3], "input[0]", "expected an object"),
        ([USER, {}], "input[1].type", "expected message, function_call"),
        ([USER, {"type": "web_search_call", "id": "x"}], "input[1].type", "web_search_call"),
        ([USER, {"type": "item_reference", "id": "x"}], "input[1]", "nothing is stored"),
        ([USER, {"id": "msg_1"}], "input[1]", "nothing is stored"),
        ([{"role": "tool", "content": "a"}], "input[0].role", "developer"),
        ([{"type": "message", "content": "a"}], "input[0].role", "None"),
        ([USER, {"role": "user"}], "input[1].content", "expected a text"),
        ([USER, {"role": "user", "content": [3]}], "input[1].content[0]", "expected an object"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input[0].content[0].type", "input_image"),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}], "input[0].content[0].type", "input_file"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text", "expected a text"),
        ([{**F_CALL, "call_id": None}], "input[0].call_id", "this call's only"),
        ([F_CALL, F_CALL], "input[1].call_id", "this call's only"),
        ([{**F_CALL, "name": "a b"}], "input[0].name", "1 to 64 characters"),
        ([{**F_CALL, "arguments": "[1]"}], "input[0].arguments", "JSON object"),
        ([{**F_CALL, "arguments": '{"a": '}], "input[0].arguments", "JSON object"),
        ([{"type": "function_call_output", "call_id": "1", "output": "x"}], "input[0].call_id", "before it"),
        (
            [F_CALL, {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image"}]}],
            "input[1].output[0].type",
            "image",
        ),
        ([F_CALL, {"type": "function_call_output", "call_id": "1", "output": {}}], "input[1].output", "expected a text"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_items_are_refused(items, param, expected):
    with pytest.raises(ApiError) as found:
        messages_of(None, items)
    assert found.value.param == param and found.value.message.startswith(param) and expected in found.value.message


@pytest.mark.parametrize(
    ("tools", "choice", "param", "expected"),
    [
        ([3], None, "tools[0]", "expected an object"),
        ([TIME, {"type": "web_search"}], None, "tools[1].type", "web_search"),
        ([CHAT_TIME], None, "tools[0].function", "leave it out"),
        ([{**TIME, "defer_loading": True}], None, "tools[0].defer_loading", "leave it out"),
        ([{**TIME, "strict": "yes"}], None, "tools[0].strict", "true or false"),
        ([{"type": "function", "name": "a b"}], None, "tools[0].name", "1 to 64 characters"),
        ([{**TIME, "parameters": "x"}], None, "tools[0].parameters", "JSON schema"),
        ([{**TIME, "description": 3}], None, "tools[0].description", "expected a text"),
        ([TIME, TIME], None, "tools[1].name", "like tools[0].name"),
        ([TIME] * 129, None, "tools", "at most 128"),
        ([TIME], {"type": "function", "name": "other"}, "tool_choice", "none of the tools"),
        ([TIME], {"type": "function", "function": {"name": "get_time"}}, "tool_choice", "expected none, auto"),
        ([TIME], {"type": "allowed_tools", "mode": "auto", "tools": []}, "tool_choice", "allowed_tools"),
        ([], "required", "tool_choice", "there are no tools"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_tools_are_refused(tools, choice, param, expected):
    with pytest.raises(ApiError) as found:
        tools_of(tools, choice, None)
    assert found.value.param == param and expected in found.value.message


@pytest.mark.parametrize(
    ("body", "param", "expected"),
    [
        ({}, "input", "is missing"),
        ({"input": 3}, "input", "expected"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0"),
        ({"max_output_tokens": 5000}, "max_output_tokens", "lower max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens", "not a parameter"),
        ({"n": 2}, "n", "not a parameter"),
        ({"temperature": -1}, "temperature", "temperature"),
        ({"top_logprobs": 21, "include": LOGPROBS["include"]}, "top_logprobs", "0 to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "in include"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "reasoning.encrypted_content"),
        ({**LOGPROBS, "tools": [TIME]}, "include", "tools are given"),
        ({"tool_choice": "sometimes"}, "tool_choice", "sometimes"),
        ({"stream_options": {"include_usage": True}, "stream": True}, "stream_options.include_usage", "not a parameter"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "without stream"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "xml"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "is missing"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "is missing"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "json_schema": {}}}}, "text.format.json_schema", "not a parameter"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format", "not"),
        ({"text": {"format": {"type": "json_object"}}, "tools": [TIME]}, "text.format", "leave one out"),
        ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}}, "structured_outputs", "leave one out"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "no setting"),
        ({"input": [{"role": "user", "content": "a"}] * 2049}, "input", "at most 2048"),
        ({"chat_template_kwargs": {"nothing": 1}}, "input", "does not use nothing"),
        ({"metadata": {"a": 1}}, "metadata", "metadata"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_parameters_are_refused(server, body, param, expected):
    status, answer = server.answer(RESPONSES, {"input": "the dog", **body} if body else {})
    assert status == 400, answer
    assert answer["error"]["param"].startswith(param) and expected in answer["error"]["message"]


@pytest.mark.parametrize("name", parameters.RESPONSES_NOT_HONOURED)
def test_parameters_that_are_not_honoured(name):
    parameter = parameters.RESPONSES_NOT_HONOURED[name]

    def parsed(value):
        *outer, last = name.split(".")
        given = {last: value}
        for each in reversed(outer):
            given = {each: given}
        return parameters.parsed(
            json.dumps({"input": "a", **given}).encode(), ResponsesBody, parameters.RESPONSES_NOT_HONOURED, ignore_unknown=False
        )

    for value in (None, *parameter.values, *(["x", 1, {}] if parameter.policy == "no effect" else [])):
        parsed(value)
    if parameter.policy == "refused":
        with pytest.raises(ApiError) as found:
            parsed("something")
        assert (found.value.param, found.value.code) == (name, "unsupported_parameter") and parameter.why in found.value.message

"""Tools in chat completions."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest

from l4jax.serving.api.chat import Chat, ChatBody, prompt_of
from l4jax.serving.api.tools import ToolAnswer, Tools
from l4jax.serving.errors import ApiError
from l4jax.serving.generation import Piece
from l4jax.serving.messages import News
from l4jax.text.chat import ChatFormat
from l4jax.text.guiding import check_guide
from l4jax.text.load import Text

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "the dog"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "x-guidance": {"whitespace_flexible": False},
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def strict(tool):
    return {**tool, "function": {**tool["function"], "strict": True}}


def joined(items):
    """What a client makes of a stream's chunks: the text, and the calls."""
    text, calls = "", []
    for item in items:
        delta = item["choices"][0]["delta"]
        text += delta.get("content") or ""
        for fragment in delta.get("tool_calls", ()):
            if fragment["index"] == len(calls):
                assert fragment["id"] and fragment["type"] == "function" and fragment["function"]["arguments"] == ""
                calls.append(json.loads(json.dumps(fragment)))
                del calls[-1]["index"]
            else:
                assert set(fragment) == {"index", "function"} and set(fragment["function"]) == {"arguments"}
                calls[fragment["index"]]["function"]["arguments"] += fragment["function"]["arguments"]
    return text, calls


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
def test_a_call_that_is_asked_for_is_made_as_its_schema_says(server, choice):
    body = {"messages": MESSAGES, "tools": [WEATHER, TIME], "tool_choice": choice, "temperature": 2.0, "seed": 4}
    _, answer = server.answer(CHAT, body)
    (found,) = answer["choices"]
    assert found["finish_reason"] == "tool_calls" and found["message"]["content"] is None
    (call,) = found["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "get_weather":
        assert arguments["city"] in ("Paris", "Rome") and 1 <= arguments["days"] <= 9
    else:
        assert choice == "required" and arguments == {}
    text, calls = joined(server.stream(CHAT, body)[:-1])
    assert text == "" and [each["function"] for each in calls] == [call["function"]]


def test_the_result_of_a_call_goes_on(server):
    """A whole round: the call's message and its result are part of the next prompt."""
    _, first = server.answer(CHAT, {"messages": MESSAGES, "tools": [WEATHER], "tool_choice": "required", "temperature": 0})
    said = first["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "rain"}
    status, answer = server.answer(CHAT, {"messages": [*MESSAGES, said, result], "tools": [WEATHER], "max_tokens": 5})
    assert status == 200 and answer["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    wrong = {**result, "tool_call_id": "other"}
    status, answer = server.answer(CHAT, {"messages": [*MESSAGES, said, wrong], "tools": [WEATHER]})
    assert status == 400 and answer["error"]["param"] == "messages"


def test_strict_tools_leave_words_free(server):
    for seed in range(4):
        body = {"messages": MESSAGES, "tools": [strict(WEATHER)], "temperature": 3.0, "seed": seed, "max_tokens": 30}
        _, answer = server.answer(CHAT, body)
        message = answer["choices"][0]["message"]
        assert message.get("tool_calls") or (message["content"].lstrip() or "x")[0] not in "{[<"


def test_tools_that_are_not_to_be_called_change_nothing(server):
    body = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    _, plain = server.answer(CHAT, body)
    _, without = server.answer(CHAT, {**body, "tools": [WEATHER], "tool_choice": "none"})
    _, with_tools = server.answer(CHAT, {**body, "tools": [WEATHER]})
    assert without["choices"][0]["message"] == plain["choices"][0]["message"]
    assert without["usage"] | {"prompt_tokens_details": None} == plain["usage"] | {"prompt_tokens_details": None}
    assert with_tools["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 50


@pytest.fixture(scope="module")
def chatting(served):
    """A front whose model has a chat template that knows no tools."""
    chat_format = ChatFormat(TEMPLATE, served.tokenizer, origin="test", variables={})
    config = dataclasses.replace(served.config, max_position_embeddings=2048)
    return dataclasses.replace(served, config=config, text=Text(served.tokenizer, chat_format))


def chat(chatting, texts, **body):
    """A request, and the pieces that the engine gives for its one answer."""
    made = Chat(chatting, ChatBody(messages=MESSAGES, max_tokens=50, **body), key=None, request_id="x")

    async def pieces():
        for number, text in enumerate(texts):
            yield [Piece(0, text, [], None, "stop" if number == len(texts) - 1 else None)]

    made.generation.pieces = pieces
    return made


CALLS = '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}; [get_time()]'


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_calls_are_found_as_the_text_comes(chatting, cut):
    text = "Let me see. " + CALLS
    pieces = [text[at : at + cut] for at in range(0, len(text), cut)]
    tools = [WEATHER, TIME]

    async def streamed():
        return [item async for items in chat(chatting, pieces, tools=tools, stream=True).stream() for item in items]

    items = asyncio.run(streamed())
    words, calls = joined(items)
    assert words == "Let me see. "
    assert [call["function"] for call in calls] == [
        {"name": "get_weather", "arguments": '{"city": "Paris", "days": 3}'},
        {"name": "get_time", "arguments": "{}"},
    ]
    assert items[-1]["choices"][0]["finish_reason"] == "tool_calls"
    whole = asyncio.run(chat(chatting, pieces, tools=tools).whole())["choices"][0]
    assert whole["message"]["content"] == words and whole["finish_reason"] == "tool_calls"
    assert [call["function"] for call in whole["message"]["tool_calls"]] == [call["function"] for call in calls]
    assert len({call["id"] for call in whole["message"]["tool_calls"]}) == 2


def test_one_call_if_no_more_are_wanted(chatting):
    whole = asyncio.run(chat(chatting, [CALLS], tools=[WEATHER, TIME], parallel_tool_calls=False).whole())["choices"][0]
    assert [call["function"]["name"] for call in whole["message"]["tool_calls"]] == ["get_weather"]


def test_a_call_that_is_not_wanted_spoils_no_other(chatting):
    text = '{"name": "get_time", "parameters": {}}\n{"name": "get_time", "parameters": {"x": oops'
    whole = asyncio.run(chat(chatting, [text], tools=[WEATHER, TIME], parallel_tool_calls=False).whole())["choices"][0]
    assert whole["finish_reason"] == "tool_calls" and len(whole["message"]["tool_calls"]) == 1
    whole = asyncio.run(chat(chatting, [text], tools=[WEATHER, TIME]).whole())["choices"][0]
    assert whole["finish_reason"] == "stop" and len(whole["message"]["tool_calls"]) == 2


def test_what_came_before_an_error_is_shown(chatting):
    """Of one step: the last text, and then the error."""

    class Client:
        ready = None

        def add(self, request, inbox):
            inbox.put(News(1, chatting.tokenizer.encode("so far")))
            inbox.put(News(1, over=True, error="why", error_kind="failed"))
            return 1

        def cancel(self, number):
            pass

    made = chat(dataclasses.replace(chatting, client=Client()), [])
    del made.generation.pieces
    shown = []

    async def read():
        async for items in made.stream():
            shown.extend(items)

    with pytest.raises(ApiError, match="why"):
        asyncio.run(read())
    assert joined(shown)[0] == "so far"


def test_log_probabilities_are_reported_of_a_bounded_number_of_tokens(chatting):
    body = {"messages": MESSAGES, "n": 16, "logprobs": True}
    with pytest.raises(ApiError, match="at most 16384 tokens in one request; lower max_tokens"):
        Chat(chatting, ChatBody(**body, max_tokens=1500), key=None, request_id="x")
    cut = Chat(chatting, ChatBody(**body), key=None, request_id="x")
    assert {request.params.max_tokens for request in cut.generation.requests} == {1024}
    free = Chat(chatting, ChatBody(messages=MESSAGES, n=16), key=None, request_id="x")
    assert free.generation.requests[0].params.max_tokens > 1500


def test_a_developer_speaks_as_the_system(chatting):
    prompts = []
    for role in ("developer", "system"):
        body = ChatBody(messages=[{"role": role, "content": "be brief"}, *MESSAGES])
        prompts.append(prompt_of(chatting, body, body.checked_tools))
    assert prompts[0] == prompts[1]


def test_without_tools_a_call_is_text(chatting):
    for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        whole = asyncio.run(chat(chatting, [CALLS], **more).whole())["choices"][0]
        assert whole["message"] == {"role": "assistant", "content": CALLS, "refusal": None} and whole["finish_reason"] == "stop"


def test_a_call_that_breaks_off_is_no_finished_one(chatting):
    whole = asyncio.run(chat(chatting, ['{"name": "get_weather", "parameters": {"city": "Pa'], tools=[WEATHER]).whole())["choices"][0]
    assert whole["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Pa' and whole["finish_reason"] == "stop"


def test_strict_calls_stand_at_the_beginning():
    """Later ones are not held to a schema, so they are text."""
    tools = Tools.of([strict(WEATHER)], None, None, MESSAGES)
    answer = ToolAnswer(tools)
    text = 'I call {"name": "get_weather", "parameters": {"city": 7}}'
    assert answer.push(text, done=True) == (text, []) and answer.message["content"] == text
    answer = ToolAnswer(tools)
    assert answer.push(" \n", done=False) == ("", [])
    answer.push('{"name": "get_weather", "parameters": {"city": "Rome", "days": 1}}', done=True)
    assert answer.calls[0]["function"]["arguments"] == '{"city": "Rome", "days": 1}'


def test_white_space_before_words_is_kept_however_it_is_cut():
    for parts in (["  Hello"], ["  ", "Hello"], [" ", " ", "Hel", "lo"], ["  "]):
        answer = ToolAnswer(Tools.of([strict(WEATHER)], None, None, MESSAGES))
        text = "".join(answer.push(part, done=part is parts[-1])[0] for part in parts)
        assert text == "".join(parts) == answer.message["content"]


@pytest.mark.parametrize("choice", [None, "required"])
def test_schemas_keep_their_own_references(choice):
    """Each has a root of its own."""
    own = {"type": "object", "$defs": {"a": {"const": 1}}, "properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]}
    other = {**own, "$defs": {"a": {"const": "b"}}}
    functions = [{"name": f"tool-{number}", "parameters": each} for number, each in enumerate((own, other))]
    tools = [strict({"type": "function", "function": function}) for function in functions]
    check_guide(Tools.of(tools, choice, None, MESSAGES).guide("json"))


def test_strict_calls_in_python_s_notation_are_refused():
    tools = Tools.of([strict(WEATHER)], "auto", None, MESSAGES)
    with pytest.raises(ApiError, match="leave strict out"):
        tools.guide("python")
    check_guide(Tools.of([strict(WEATHER)], "required", None, MESSAGES).guide("python"))


@pytest.mark.parametrize(
    ("body", "param", "expected"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "expected 'function'"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "its own name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "1 to 64 characters"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools", "at most 128"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice", "none of the tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "custom"}}, "tool_choice", "expected none, auto, required"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice", "sometimes"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format", "leave one out"),
        (
            {"tools": [strict({"type": "function", "function": {"name": "f", "parameters": {"not": {}}}})]},
            "tools",
            'Unimplemented keys: ["not"]',
        ),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools", "expected 'object'"),
        ({"functions": []}, "functions", "tools have taken its place"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_tools_are_refused(server, body, param, expected):
    status, answer = server.answer(CHAT, {"messages": MESSAGES, "max_tokens": 4, **body})
    assert status == 400
    assert answer["error"]["param"] == param and expected in answer["error"]["message"]

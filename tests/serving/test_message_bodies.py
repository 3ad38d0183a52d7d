"""Requests in Anthropic's form, and what is done with every parameter that its clients can send."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from l4jax.serving import parameters
from l4jax.serving.api.message_bodies import MessagesBody, TokenCountBody, parsed_messages
from l4jax.serving.errors import ApiError
from tests.serving.message_requests import ASKED, RESULT, TIME, USE, WEATHER, asked
from tests.serving.running import CONTEXT

ROUTE = "/v1/messages"


def parsed(body, *, ignore_unknown=False):
    return parsed_messages(msgspec.json.encode(body), ignore_unknown=ignore_unknown)


def refusal(body):
    with pytest.raises(ApiError) as found:
        parsed(body)
    return found.value


def test_a_conversation_in_openai_s_form():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c", "citations": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "d"}, {**USE, "caller": {"type": "direct"}}]},
        {"role": "user", "content": [{**RESULT, "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "e"}]},
        {"role": "system", "content": "f"},
        {"role": "assistant", "content": [{**USE, "id": "toolu_2"}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True, "content": "no"}]},
        {"role": "assistant", "content": "g"},
    ]
    chat = parsed(asked(messages=messages, system="s", tools=[WEATHER], stop_sequences=["x"], top_k=3, top_p=0.5, stream=True))
    function = {"name": "get_weather", "arguments": USE["input"]}
    assert chat.messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a\n\nbc"},
        {"role": "assistant", "content": "d", "tool_calls": [{"id": "toolu_1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "rain"},
        {"role": "user", "content": "e"},
        {"role": "system", "content": "f"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "toolu_2", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no"},
        {"role": "assistant", "content": "g"},
    ]
    assert chat.continue_final_message and chat.stream
    assert (chat.max_tokens, chat.stop, chat.temperature, chat.top_k, chat.top_p) == (12, ["x"], 0, 3, 0.5)
    assert chat.checked_tools.names == ["get_weather"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, (["get_weather", "get_time"], False, True)),
        ({"type": "auto"}, (["get_weather", "get_time"], False, True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, (["get_weather", "get_time"], False, False)),
        ({"type": "any"}, (["get_weather", "get_time"], True, True)),
        ({"type": "tool", "name": "get_time"}, (["get_time"], True, True)),
        ({"type": "none"}, ([], False, True)),
    ],
    ids=str,
)
def test_which_tools_may_be_called(choice, expected):
    tools = parsed(asked(tools=[WEATHER, {**TIME, "type": "custom"}], **({} if choice is None else {"tool_choice": choice}))).checked_tools
    assert (tools.names, tools.forced, tools.parallel) == expected


def said(*blocks, role="user"):
    return {"messages": [{"role": role, "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("more", "place", "expected"),
    [
        ({"max_tokens": None}, "max_tokens", "expected integer"),
        ({"max_tokens": 1.5}, "max_tokens", "expected integer"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'tool'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name", "is not a parameter"),
        (said({"type": "image", "source": {}}), "messages[0].content[0].type", "'image'; expected text or tool_result"),
        (said({"type": "document", "source": {}}), "messages[0].content[0].type", "'document'"),
        (said({"type": "thinking", "thinking": "x"}, role="assistant"), "messages[0].content[0].type", "'thinking'"),
        (said(USE), "messages[0].content[0].type", "'tool_use'"),
        (said({"type": "text"}), "messages[0].content[0].text", "is missing"),
        (said({"type": "text", "text": 3}), "messages[0].content[0].text", "expected string (text is 3)"),
        (said({"type": "text", "text": "x", "citations": [1]}), "messages[0].content[0].citations", "do not cite"),
        (said(RESULT), "messages[0].content[0].tool_use_id", "there is none"),
        (said({**USE, "input": []}, role="assistant"), "messages[0].content[0].input", "expected object"),
        (said({**USE, "name": "a b"}, role="assistant"), "messages[0].content[0].name", "1 to 64 characters"),
        (said(USE, USE, role="assistant"), "messages[0].content[1].id", "this call's only"),
        (said(USE, role="assistant"), "messages", "no tool_use"),
        (said({"type": "text", "text": ""}, role="assistant"), "messages", "expected some text"),
        ({"system": [{"type": "image"}]}, "system[0].type", "expected text"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 1}]}, "tools[0].type", "no tools of its own"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema", "is missing"),
        ({"tools": [{**TIME, "input_schema": 3}]}, "tools[0].input_schema", "expected object"),
        ({"tools": [{**TIME, "input_examples": [{}]}]}, "tools[0].input_examples", "not shown"),
        ({"tools": [{**TIME, "name": "a b"}]}, "tools", "tools[0].name is 'a b'"),
        ({"tools": [TIME, TIME]}, "tools", "like tools[0].name"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name", "is missing"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type", "'some'"),
        ({"output_config": {"effort": "high"}}, "output_config.effort", "no setting"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format", "'text'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking", "no separate thinking"),
        ({"n": 2}, "n", "is not a parameter"),
        ({"messages": [{"role": "user", "content": "a"}] * 2049}, "messages", "at most 2048"),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": [USE]}, *[{"role": "user", "content": [RESULT]}] * 2]},
            "messages[3].content[0].tool_use_id",
            "one result for each tool_use",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_requests_are_refused_with_the_clients_names(more, place, expected):
    error = refusal(asked(**more))
    assert error.status == 400 and expected in error.message and "\n" not in error.message
    assert error.param.startswith(place) and place in error.message, (error.param, error.message)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"stop_sequences": ["x" * 2000]}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": CONTEXT}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 7}, "top_p"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"uniqueItems": True}}}}, "output_config.format"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}}}, "tools": [TIME]}, "output_config.format"),
        ({"tools": [{**TIME, "strict": True, "input_schema": {"not": {}}}]}, "tools"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_requests_that_the_model_cannot_answer(server, more, name):
    status, answer = server.answer(ROUTE, asked(**more))
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    assert name in answer["error"]["message"]


def test_unknown_names_in_parts_may_be_ignored(caplog):
    body = asked(messages=[{"role": "user", "content": [{"type": "text", "text": "x", "novel": 1}]}])
    assert refusal(body).param == "messages[0].content[0].novel"
    assert parsed(body, ignore_unknown=True).messages == [{"role": "user", "content": "x"}]
    assert "messages[0].content[0].novel" in caplog.text


# Parameters. The keyword arguments of anthropic 2.14's messages.create and beta.messages.create that go into the body, and those of
# earlier clients.
CREATE = """max_tokens messages model cache_control container diagnostics inference_geo metadata output_config service_tier speed
stop_sequences stream system thinking tool_choice tools billing_policy compaction context_management fallback_credit_token fallbacks
mcp_servers thread temperature top_k top_p"""
COUNT_TOKENS = "messages model cache_control output_config speed system thinking tool_choice tools context_management mcp_servers"
PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("kind", "names"), [(MessagesBody, CREATE), (TokenCountBody, COUNT_TOKENS)])
def test_every_parameter_has_one_policy(kind, names):
    honoured, not_honoured = set(kind.__struct_fields__), set(parameters.MESSAGES_NOT_HONOURED)
    assert not honoured & not_honoured
    assert set(names.split()) <= honoured | not_honoured


def test_the_docs_have_every_parameter():
    section = PAGE.split("## Anthropic's Messages API\n")[1].split("\n## ")[0]
    rows = {name: (policy, notes) for name, policy, notes in re.findall(r"^\| `([^`]+)` \| ([^|]+) \| (.*) \|$", section, re.MULTILINE)}
    for name in MessagesBody.__struct_fields__:
        assert rows.pop(name)[0] == "honoured", name
    prefixes = {"block": "a block's ", "tool": "a tool's ", "output_config": "output_config."}
    assert set(prefixes) == set(parameters.MESSAGE_PARTS_NOT_HONOURED)
    listed = dict(parameters.MESSAGES_NOT_HONOURED)
    listed |= {
        f"{prefixes[part]}{name}": each for part, ones in parameters.MESSAGE_PARTS_NOT_HONOURED.items() for name, each in ones.items()
    }
    for name, parameter in listed.items():
        values = ", ".join(f"`{parameters._as_json(value)}`" for value in parameter.values)
        assert rows.pop(name) == (parameter.policy, parameter.why + (f" (accepted: {values})" if values else "")), name
    assert not rows


@pytest.mark.parametrize("name", parameters.MESSAGES_NOT_HONOURED)
def test_parameters_that_are_not_honoured(name):
    parameter = parameters.MESSAGES_NOT_HONOURED[name]
    for value in [None, *parameter.values, *(["x", 1, {}] if parameter.policy == "no effect" else [])]:
        parsed(asked(**{name: value}))
    if parameter.policy == "refused":
        error = refusal(asked(**{name: "something"}))
        assert (error.status, error.param) == (400, name) and parameter.why in error.message

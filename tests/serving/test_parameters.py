"""What is done with every parameter that OpenAI's clients can send, and with bodies that are no requests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from l4jax.serving import parameters
from l4jax.serving.api.chat import ChatBody
from l4jax.serving.api.completions import CompletionBody
from l4jax.serving.api.responses import ResponsesBody
from l4jax.serving.errors import ApiError

# The keyword arguments of openai 3.57's chat.completions.create, completions.create and responses.create.
CHAT = """messages model audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens metadata
modalities moderation n parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_options prompt_cache_retention
reasoning_effort response_format safety_identifier seed service_tier stop store stream stream_options temperature tool_choice tools
top_logprobs top_p user verbosity web_search_options"""
COMPLETIONS = """best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty prompt seed stop stream
stream_options suffix temperature top_p user"""
RESPONSES = """access_programs background background_options context_management conversation image include input instructions
max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls previous_response_id prompt prompt_cache_key
prompt_cache_options prompt_cache_retention reasoning safety_identifier service_tier store stream stream_options temperature text
tool_choice tools top_logprobs top_p truncation user"""
ROUTES = {
    "chat": (ChatBody, parameters.CHAT_NOT_HONOURED, CHAT),
    "completions": (CompletionBody, parameters.COMPLETION_NOT_HONOURED, COMPLETIONS),
    "responses": (ResponsesBody, parameters.RESPONSES_NOT_HONOURED, RESPONSES),
}
PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
MESSAGES = b'"messages": [{"role": "user", "content": "hi"}]'


def parsed(raw: bytes, *, ignore_unknown: bool = False):
    return parameters.parsed(raw, ChatBody, parameters.CHAT_NOT_HONOURED, ignore_unknown=ignore_unknown)


def refusal(raw: bytes) -> ApiError:
    with pytest.raises(ApiError) as found:
        parsed(raw)
    return found.value


@pytest.mark.parametrize("route", ROUTES)
def test_every_parameter_has_one_policy(route):
    kind, not_honoured, names = ROUTES[route]
    honoured = set(kind.__struct_fields__)
    assert not honoured & set(not_honoured)
    assert set(re.findall(r"\w+", names)) <= honoured | set(not_honoured)


@pytest.mark.parametrize("route", ROUTES)
def test_the_docs_have_every_parameter(route):
    kind, not_honoured, _ = ROUTES[route]
    found = re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| ([^|]+) \| (.*) \|$", PAGE, re.MULTILINE)
    rows = {name: (policy, notes) for name, policy, routes, notes in found if route in routes.split(", ")}
    assert set(rows) == set(kind.__struct_fields__) | set(not_honoured)
    for name in kind.__struct_fields__:
        assert rows[name][0] == "honoured", name
    for name, parameter in not_honoured.items():
        values = ", ".join(f"`{parameters._as_json(value)}`" for value in parameter.values)
        assert rows[name] == (parameter.policy, parameter.why + (f" (accepted: {values})" if values else "")), name


@pytest.mark.parametrize("name", parameters.CHAT_NOT_HONOURED)
def test_parameters_that_are_not_honoured(name):
    parameter = parameters.CHAT_NOT_HONOURED[name]
    taken = [None, *parameter.values, *(["x", 1, {}] if parameter.policy == "no effect" else [])]
    for value in taken:
        parsed(b"{" + MESSAGES + f', "{name}": {parameters._as_json(value)}'.encode() + b"}")
    if parameter.policy == "refused":
        error = refusal(b"{" + MESSAGES + f', "{name}": "something"'.encode() + b"}")
        assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
        assert parameter.why in error.message


def test_unknown_parameters_are_refused_or_logged(caplog):
    raw = b"{" + MESSAGES + b', "best_answer": true}'
    error = refusal(raw)
    assert (error.param, error.code) == ("best_answer", "unknown_parameter")
    assert parsed(raw, ignore_unknown=True).messages
    assert "best_answer" in caplog.text


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "JSON array"),
        (b"null", "JSON null"),
        (b'{"temperature": NaN}', "not valid JSON"),
        (b'{"temperature": Infinity}', "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "not valid JSON"),
        (b'{"messages": "\xff"}', "not valid JSON"),
        (b"{}", "messages is missing"),
        (b'{"messages": 3}', "messages is wrong: expected array (messages is 3)"),
        (b"{" + MESSAGES + b', "max_tokens": true}', "max_tokens is wrong: expected integer or null (max_tokens is true)"),
        (b"{" + MESSAGES + b', "max_tokens": 1.5}', "expected integer or null (max_tokens is 1.5)"),
        (b"{" + MESSAGES + b', "temperature": "hot"}', "temperature is wrong"),
        (b"{" + MESSAGES + b', "stop": [1]}', "stop[0] is wrong: expected string"),
        (b"{" + MESSAGES + b', "stream_options": {"every": 1}}', "'stream_options.every' is not a parameter"),
    ],
)
def test_invalid_bodies_are_refused(raw, expected):
    error = refusal(raw)
    assert error.status == 400 and expected in error.message and "\n" not in error.message


def test_the_last_of_two_equal_keys_counts():
    assert parsed(b"{" + MESSAGES + b', "n": 3, "n": 2}').answers == 2


def test_huge_numbers_are_read():
    assert parsed(b"{" + MESSAGES + b', "seed": 99999999999999999999999999}').seed == 99999999999999999999999999

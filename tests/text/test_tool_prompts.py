"""Tools in a conversation: what is refused, and what the chat template gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from l4jax.text.chat import ChatFormat, load_chat_format
from l4jax.text.hf_tokenizer import HfTokenizer
from l4jax.text.tiktoken_tokenizer import LLAMA3_RANKS, LLAMA4_RANKS, TiktokenTokenizer
from l4jax.text.tokenizer import Tokenizer
from l4jax.text.tool_calls import ToolCall, parse_answer
from l4jax.text.tool_prompts import MAX_TOOLS, ToolPrompt, arguments_as_objects, check_tools, one_call_a_message, tools_as_text
from tests.text import small

TOKENIZER = HfTokenizer(small.backend(), {})

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Météo <&>", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "get_time"}},
]


def call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


USER = {"role": "user", "content": "Weather?"}
SAID = {
    "role": "assistant",
    "content": None,
    "tool_calls": [call("call_1", "get_weather", '{"city": "Orléans"}'), call("call_2", "get_time", "")],
}
RESULTS = [
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "12:"}, {"type": "text", "text": "00"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]
CONVERSATION: list[dict[str, Any]] = [USER, SAID, *RESULTS, {"role": "user", "content": "Thanks"}]

# As the templates of Llama 3.1 and Llama 4 do, cut down to what matters here.
JSON_TEMPLATE = """\
{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once!') }}\
{% endif %}{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|im_end|>\
{% else %}{{ m.role }}: {{ m.content }}<|im_end|>{% endif %}{% if loop.first and tools %}\
Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\
{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}{% endfor %}"""
PYTHON_TEMPLATE = """\
{% if tools %}Use exact format: [func_name1(param1=value1, param2=value2), func_name2(...)]{{ tools | tojson }}{% endif %}\
{% for m in messages %}{% if m.tool_calls %}[{% for c in m.tool_calls %}{{ c.function.name }}({% for p in c.function.arguments %}\
{{ p }}="{{ c.function.arguments[p] }}"{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]\
{% else %}{{ m.role }}: {{ m.content }}{% endif %}<|im_end|>{% endfor %}"""


def chat_format(template: str) -> ChatFormat:
    return ChatFormat(template, TOKENIZER, origin="test", variables={})


def test_a_request_that_can_be_used() -> None:
    check_tools(TOOLS, CONVERSATION)
    check_tools(None, [USER])
    check_tools([], CONVERSATION)
    check_tools([{"type": "function", "function": {"name": f"f.{n}_-"}} for n in range(MAX_TOOLS)], [USER])
    # Some clients count calls anew in every message, and some give objects.
    check_tools(TOOLS, [*CONVERSATION, {**SAID, "tool_calls": [call("call_1", "get_time", {"x": 1})]}, RESULTS[1]])


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("f", "tools is 'f'; expected a list of tools"),
        ({"f": 1}, r"tools is \{'f': 1\}; expected a list of tools"),
        ([function(name=f"f{n}") for n in range(129)], "tools has 129 tools; expected at most 128; leave some out"),
        ([5], "tools\\[0\\] is 5; expected an object"),
        ([function(), {"function": {"name": "g"}}], r"tools\[1\].type is None; expected 'function'"),
        ([{"type": "web_search"}], r"tools\[0\].type is 'web_search'; expected 'function'"),
        ([{"type": "function", "name": "f"}], r"tools\[0\].function is None; expected an object with a name"),
        ([function(), function(name="g h")], r"tools\[1\].function.name is 'g h'; expected 1 to 64 characters of letters"),
        ([function(name="")], r"tools\[0\].function.name is ''"),
        ([function(name="é")], r"tools\[0\].function.name is 'é'"),
        ([function(name="f\n")], r"tools\[0\].function.name is 'f\\n'"),
        ([function(name="f" * 65)], r"tools\[0\].function.name is 'fff"),
        ([function(name=None)], r"tools\[0\].function.name is None"),
        (
            [function(), function(name="g"), function()],
            r"tools\[2\].function.name is 'f', like tools\[0\].function.name; expected every",
        ),
        ([function(parameters=[])], r"tools\[0\].function.parameters is \[\]; expected a JSON schema"),
        ([function(parameters={"a": float("nan")})], r"tools\[0\].function.parameters is nested too deep, or is not JSON"),
        ([function(description=5)], r"tools\[0\].function.description is 5; expected a text"),
    ],
)
def test_tools_that_are_refused(tools: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        check_tools(tools, [USER])
    assert "\n" not in str(raised.value)


def test_a_schema_that_is_nested_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(200_000):
        schema = {"a": schema}
    with pytest.raises(ValueError, match=r"^tools\[0\].function.parameters is nested too deep"):
        check_tools([function(parameters=schema)], [])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, RESULTS[0]], r"messages\[1\].tool_call_id is 'call_2'; expected a call before it, and there is none"),
        ([RESULTS[0], SAID], r"messages\[0\].tool_call_id is 'call_2'; expected a call before it"),
        (
            [SAID, {"role": "tool", "tool_call_id": "call_3", "content": ""}],
            r"messages\[1\].tool_call_id is 'call_3'; expected the id of an earlier call \('call_1, call_2'\); give",
        ),
        ([SAID, {"role": "tool", "content": ""}], r"messages\[1\].tool_call_id is None; expected the id"),
        ([SAID, {"role": "tool", "tool_call_id": ["call_1"], "content": ""}], r"messages\[1\].tool_call_id is \['call_1'\]; expected"),
        ([{**USER, "tool_calls": []}], r"messages\[0\].tool_calls is given with role 'user'; expected role 'assistant'"),
        ([{**SAID, "tool_calls": "f"}], r"messages\[0\].tool_calls is 'f'; expected a list of calls"),
        ([{**SAID, "tool_calls": [5]}], r"messages\[0\].tool_calls\[0\] is 5; expected an object with an id"),
        ([{**SAID, "tool_calls": [{"id": "a"}]}], r"messages\[0\].tool_calls\[0\].type is None"),
        ([{**SAID, "tool_calls": [call("", "f", "{}")]}], r"messages\[0\].tool_calls\[0\].id is ''; expected a text"),
        ([{**SAID, "tool_calls": [call("a", "f", "{}")] * 2}], r"messages\[0\].tool_calls\[1\].id is 'a'; expected a text"),
        ([{**SAID, "tool_calls": [call("a", "f g", "{}")]}], r"messages\[0\].tool_calls\[0\].function.name is 'f g'"),
        (
            [{**SAID, "tool_calls": [call("a", "f", '{"a')]}],
            r"messages\[0\].tool_calls\[0\].function.arguments is '\{\"a'; expected a",
        ),
        (
            [{**SAID, "tool_calls": [call("a", "f", "[1]")]}],
            r"messages\[0\].tool_calls\[0\].function.arguments is '\[1\]'; expected a",
        ),
        ([{**SAID, "tool_calls": [call("a", "f", [1])]}], r"messages\[0\].tool_calls\[0\].function.arguments is \[1\]; expected a JSON"),
        ([{**SAID, "tool_calls": [call("a", "f", "[" * 99_999)]}], r"messages\[0\].tool_calls\[0\].function.arguments is '\[\["),
        ([USER, "hi"], r"messages\[1\] is 'hi'; expected an object with role and content"),
    ],
)
def test_messages_that_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        check_tools(TOOLS, messages)
    assert "\n" not in str(raised.value)


def test_a_call_has_one_result() -> None:
    with pytest.raises(ValueError, match=r"^messages\[4\]\.tool_call_id is 'call_1', like an earlier result's"):
        check_tools(TOOLS, [USER, SAID, *RESULTS, RESULTS[1]])


def test_tools_as_text() -> None:
    system, user, said, results, thanks = tools_as_text(CONVERSATION, TOOLS)
    assert system["role"] == "system"
    lines = system["content"].split("\n")
    assert '{"name": "get_weather", "description": "Météo <&>", "parameters": ' + json.dumps(SCHEMA) + "}" in lines
    assert '{"name": "get_time"}' in lines
    assert '{"name": function name, "parameters": dictionary of argument name and its value}' in system["content"]
    assert (user, thanks) == (USER, CONVERSATION[-1])
    calls = ['{"name": "get_weather", "parameters": {"city": "Orléans"}}', '{"name": "get_time", "parameters": {}}']
    assert said == {"role": "assistant", "content": "\n".join(calls)}
    assert results == {"role": "user", "content": f"Result of {calls[1]}:\n12:00\n\nResult of {calls[0]}:\nsunny"}


def test_calls_as_text_are_what_is_read_from_an_answer() -> None:
    text = tools_as_text([USER, {**SAID, "content": "Just a moment."}], None)[1]["content"]
    answer = parse_answer(text, ["get_weather", "get_time"])
    assert answer.text == "Just a moment.\n"
    assert answer.calls == [ToolCall("get_weather", '{"city": "Orléans"}'), ToolCall("get_time", "{}")]


@pytest.mark.parametrize("content", ["Be brief.", [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]])
def test_the_callers_system_message_comes_first(content: Any) -> None:
    system, user = tools_as_text([{"role": "system", "content": content}, USER], TOOLS)
    assert system["content"].startswith("Be brief.\n\nYou may call functions.")
    assert user == USER


def test_without_tools_no_system_message_is_added() -> None:
    assert [message["role"] for message in tools_as_text(CONVERSATION, None)] == ["user", "assistant", "user", "user"]
    assert tools_as_text([USER], []) == [USER]


def test_what_is_given_stays_as_it_is() -> None:
    before = json.dumps([CONVERSATION, TOOLS])
    tools_as_text(CONVERSATION, TOOLS)
    one_call_a_message(arguments_as_objects(CONVERSATION))
    assert json.dumps([CONVERSATION, TOOLS]) == before


def test_a_result_that_is_no_text_is_refused() -> None:
    for content in (5, [{"type": "image_url"}], ["a"]):
        with pytest.raises(ValueError, match=r"^messages has content .* of role tool; expected a text, or parts of type text"):
            tools_as_text([SAID, {**RESULTS[0], "content": content}], TOOLS)


def test_templates_get_arguments_as_objects() -> None:
    said = arguments_as_objects(CONVERSATION)[1]
    assert [each["function"]["arguments"] for each in said["tool_calls"]] == [{"city": "Orléans"}, {}]
    assert [each["id"] for each in said["tool_calls"]] == ["call_1", "call_2"]


def test_one_call_a_message() -> None:
    given = [USER, {**SAID, "content": "Wait."}, *RESULTS, CONVERSATION[-1]]
    first, second = SAID["tool_calls"]
    assert one_call_a_message(given) == [
        USER,
        {"role": "assistant", "content": "Wait.", "tool_calls": [first]},
        RESULTS[1],
        {"role": "assistant", "content": "", "tool_calls": [second]},
        RESULTS[0],
        CONVERSATION[-1],
    ]
    # A result of an older call is kept.
    older = {"role": "assistant", "content": "", "tool_calls": [call("old", "get_time", "{}")]}
    late = {"role": "tool", "tool_call_id": "old", "content": "late"}
    assert one_call_a_message([older, SAID, *RESULTS, late])[-1] == late
    assert one_call_a_message([older, late]) == [older, late]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, *(TiktokenTokenizer(small.tiktoken_ranks(r)) for r in (LLAMA3_RANKS, LLAMA4_RANKS))])
def test_the_built_in_templates_get_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = load_chat_format(tmp_path, tokenizer)
    assert chat is not None and chat.origin.startswith("built-in")
    prompt = ToolPrompt.of(chat)
    assert prompt == ToolPrompt("json", in_template=False, parallel=True)
    messages, tools = prompt.prepare(CONVERSATION, TOOLS)
    assert (messages, tools) == (tools_as_text(CONVERSATION, TOOLS), None)
    assert 'Result of {"name": "get_time", "parameters": {}}:\n12:00' in chat.render(messages, tools=tools)


def test_a_template_for_json_that_writes_one_call_a_message() -> None:
    chat = chat_format(JSON_TEMPLATE)
    prompt = ToolPrompt.of(chat)
    assert prompt == ToolPrompt("json", in_template=True, parallel=False)
    messages, tools = prompt.prepare(CONVERSATION, TOOLS)
    assert tools == TOOLS
    text = chat.render(messages, tools=tools)
    assert '{"name": "get_weather", "parameters": {"city": "Orléans"}}<|im_end|>tool: sunny<|im_end|>' in text
    assert '{"name": "get_time", "parameters": {}}<|im_end|>tool: 12:00<|im_end|>' in text
    assert prompt.prepare(CONVERSATION, None) == (messages, None)


def test_a_template_for_python() -> None:
    chat = chat_format(PYTHON_TEMPLATE)
    prompt = ToolPrompt.of(chat)
    assert prompt == ToolPrompt("python", in_template=True, parallel=True)
    messages, tools = prompt.prepare(CONVERSATION, TOOLS)
    assert '[get_weather(city="Orléans"), get_time()]<|im_end|>tool: 12:00' in chat.render(messages, tools=tools)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        # It names the tools, but has no form for a call and its result.
        "{{ tools }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}",
        # It has the variable, and does not write the tools.
        "{% if tools %}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_write_tools_gets_text(template: str) -> None:
    assert not ToolPrompt.of(chat_format(template)).in_template

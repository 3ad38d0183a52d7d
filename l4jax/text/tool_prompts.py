"""Tools in a conversation: checked, and put into a prompt in the way that the model's chat template takes. Imports no JAX."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from l4jax.text.chat import ChatFormat
from l4jax.text.literals import Notation
from l4jax.text.template import ChatError
from sharding.kinds import shown

MAX_TOOLS = 128
MAX_ARGUMENTS_CHARACTERS = 1 << 20

Message = Mapping[str, Any]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

_INSTRUCTION = """\
You may call functions. These are their names, what they do, and the JSON schemas of their parameters:

{tools}

To call a function, answer with nothing but JSON in the format \
{{"name": function name, "parameters": dictionary of argument name and its value}}. Do not use variables. \
To call several functions, write one such object a line. Call only functions of the list. You are then given their results, to answer \
from. If no function is needed, answer in words."""


def check_tools(tools: Any, messages: Sequence[Any]) -> None:
    """Check a request's tools (None: there are none), and its messages' calls of tools and results, in OpenAI's form.

    Raises ValueError with one line that begins with the parameter.
    """
    if tools is not None:
        _check_list("tools", tools, "a list of tools")
        what = "an object with type 'function' and a function"
        check_functions([(f"tools[{number}].function", _function(f"tools[{number}]", tool, what)) for number, tool in enumerate(tools)])
    earlier: dict[str, None] = {}
    answered: set[object] = set()
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} is {shown(message)}; expected an object with role and content; give one")
        role, calls, call_id = (message.get(key) for key in ("role", "tool_calls", "tool_call_id"))
        if calls is not None:
            if role != "assistant":
                raise ValueError(f"{where}.tool_calls is given with role {shown(role)}; expected role 'assistant'; leave it out")
            own = _checked_calls(f"{where}.tool_calls", calls)
            earlier |= own
            answered -= own.keys()  # ids may come again in a later turn
        if role == "tool" and not (isinstance(call_id, str) and call_id in earlier):
            known = f"the id of an earlier call ({shown(', '.join(earlier))})" if earlier else "a call before it, and there is none"
            raise ValueError(f"{where}.tool_call_id is {shown(call_id)}; expected {known}; give the call's message and its id")
        if role == "tool":
            if call_id in answered:
                raise ValueError(
                    f"{where}.tool_call_id is {shown(call_id)}, like an earlier result's; expected one for each call; leave it out"
                )
            answered.add(call_id)


def check_functions(functions: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Check the functions of a request's tools, each with its place in the request. Raises ValueError as :func:`check_tools` does."""
    check_names([(f"{where}.name", function.get("name")) for where, function in functions])
    for where, function in functions:
        description = function.get("description")
        if not isinstance(description, str | None):
            raise ValueError(f"{where}.description is {shown(description)}; expected a text; give one, or leave it out")
        parameters = function.get("parameters")
        if not isinstance(parameters, Mapping | None):
            raise ValueError(f"{where}.parameters is {shown(parameters)}; expected a JSON schema; give one, or leave it out")
        if parameters and parameters.get("type", "object") != "object":
            given = shown(parameters["type"])
            raise ValueError(f"{where}.parameters.type is {given}; expected 'object', which arguments are; correct it, or leave it out")
        try:
            json.dumps(parameters, allow_nan=False)
        except (RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{where}.parameters is nested too deep, or is not JSON; expected a JSON schema; simplify it") from error


def check_names(tools: Sequence[tuple[str, Any]]) -> None:
    """Check the names of a request's tools, each with its place in the request. Raises ValueError as :func:`check_tools` does."""
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"tools has {len(tools)} tools; expected at most {MAX_TOOLS}; leave some out")
    places: dict[str, str] = {}
    for where, name in tools:
        check_name(where, name)
        if name in places:
            raise ValueError(f"{where} is {shown(name)}, like {places[name]}; expected every tool to have its own name; rename one")
        places[name] = where


def check_name(where: str, name: Any) -> str:
    """Return a tool's name. Raises ValueError if it is none."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        characters = "letters of A-Z and a-z, digits, '_', '.' and '-'"
        raise ValueError(f"{where} is {shown(name)}; expected 1 to 64 characters of {characters}; rename it")
    return name


def check_arguments(where: str, arguments: Any) -> None:
    """Raise ValueError unless a call's arguments are a JSON object."""
    if isinstance(arguments, str) and len(arguments) > MAX_ARGUMENTS_CHARACTERS:
        raise ValueError(f"{where} has {len(arguments)} characters; expected at most {MAX_ARGUMENTS_CHARACTERS}; leave the call out")
    try:
        found = _as_object(arguments)
        json.dumps(found)
    except (RecursionError, TypeError, ValueError):
        found = None
    if not isinstance(found, dict):
        given = shown(arguments)
        raise ValueError(f"{where} is {given}; expected a JSON object, as a text; correct it, or leave the call out")


@dataclasses.dataclass(frozen=True)
class ToolPrompt:
    """How a model's prompts speak of tools.

    ``notation``: in which the model is asked to write calls. ``in_template``: its chat template writes tools, calls and results itself;
    if not, they are put into messages of text. ``parallel``: it writes several calls in one message.
    """

    notation: Notation
    in_template: bool
    parallel: bool

    @classmethod
    def of(cls, chat: ChatFormat) -> ToolPrompt:
        """Tell from what the chat template writes of a short conversation."""
        prompt = _rendered(chat, [_QUESTION])
        if _TRIED not in prompt or _TRIED_RESULT not in _rendered(chat, _answered(1)):
            return cls("json", in_template=False, parallel=True)
        notation: Notation = "python" if _PYTHON_CALL.search(prompt) else "json"
        return cls(notation, in_template=True, parallel=_TRIED_RESULT in _rendered(chat, _answered(2)))

    def prepare(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]] | None]:
        """Return the messages and the tools to give to the chat template. Expects what :func:`check_tools` has checked."""
        if not self.in_template:
            return tools_as_text(messages, tools), None
        prepared = arguments_as_objects(messages)
        return (prepared if self.parallel else one_call_a_message(prepared)), (list(tools) if tools else None)


def arguments_as_objects(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages with the calls' arguments as objects: templates write them as JSON, and a JSON string would be quoted twice."""
    prepared = [dict(message) for message in messages]
    for message in prepared:
        if message.get("tool_calls"):
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _arguments(call)}} for call in message["tool_calls"]
            ]
    return prepared


def one_call_a_message(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages with every call in one of its own, and its result after it: for templates that write no more."""
    prepared: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        message = dict(messages[at])
        at += 1
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            prepared.append(message)
            continue
        results = []
        while at < len(messages) and messages[at].get("role") == "tool":
            results.append(dict(messages[at]))
            at += 1
        for call in calls:
            prepared.append({**message, "tool_calls": [call]})
            prepared += [result for result in results if result.get("tool_call_id") == call["id"]]
            message["content"] = ""  # it is said once
        ids = {call["id"] for call in calls}
        prepared += [result for result in results if result.get("tool_call_id") not in ids]
    return prepared


def tools_as_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Return the conversation for a template that knows no tools: no message has calls, and none is of role tool.

    The system message, which is added if there is none, lists the tools and asks for calls in Llama 3's JSON. Earlier calls are what the
    assistant said, in this form, and results are what the user says, with the call that each answers.
    """
    prepared: list[dict[str, Any]] = []
    calls: dict[str, str] = {}
    results: list[str] = []
    for message in messages:
        if message.get("role") == "tool":
            results.append(f"Result of {calls[message['tool_call_id']]}:\n{_text(message)}")
            continue
        # Templates may ask for user and assistant in turn: the results of parallel calls are one message.
        prepared += _joined(results)
        results = []
        plain = {key: value for key, value in message.items() if key != "tool_calls"}
        if message.get("tool_calls"):
            written = {call["id"]: _call_as_text(call) for call in message["tool_calls"]}
            calls |= written
            plain["content"] = "\n".join(filter(None, (_text(message), *written.values())))
        prepared.append(plain)
    prepared += _joined(results)
    if not tools:
        return prepared
    instruction = _INSTRUCTION.format(tools="\n".join(_tool_as_text(tool) for tool in tools))
    if not prepared or prepared[0].get("role") != "system":
        return [{"role": "system", "content": instruction}, *prepared]
    return [{**prepared[0], "content": "\n\n".join(filter(None, (_text(prepared[0]), instruction)))}, *prepared[1:]]


def _joined(results: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "\n\n".join(results)}] if results else []


def _check_list(where: str, value: Any, expected: str) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ValueError(f"{where} is {shown(value)}; expected {expected}")


def _function(where: str, value: Any, expected: str) -> Mapping[str, Any]:
    """Return the function of an object of type function."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {shown(value)}; expected {expected}")
    if value.get("type") != "function":
        raise ValueError(f"{where}.type is {shown(value.get('type'))}; expected 'function', which is the only type supported; give it")
    function = value.get("function")
    if not isinstance(function, Mapping):
        raise ValueError(f"{where}.function is {shown(function)}; expected an object with a name; give it")
    return function


def _checked_calls(where: str, calls: Any) -> dict[str, None]:
    """Check a message's calls; return their ids, in order."""
    ids: dict[str, None] = {}
    _check_list(where, calls, "a list of calls")
    for number, call in enumerate(calls):
        each = f"{where}[{number}]"
        function = _function(each, call, "an object with an id, type 'function' and a function")
        check_name(f"{each}.function.name", function.get("name"))
        call_id = call.get("id")
        if not isinstance(call_id, str) or not call_id or call_id in ids:
            raise ValueError(f"{each}.id is {shown(call_id)}; expected a text that is this call's only; give it")
        ids[call_id] = None
        check_arguments(f"{each}.function.arguments", function.get("arguments"))
    return ids


def _arguments(call: Mapping[str, Any]) -> Any:
    return _as_object(call["function"].get("arguments"))


def _as_object(arguments: Any) -> Any:
    """A call's arguments as an object. OpenAI's form is a JSON string, without any for a function that takes none."""
    if isinstance(arguments, Mapping):
        return dict(arguments)
    return json.loads(arguments) if arguments else {}


def _call_as_text(call: Mapping[str, Any]) -> str:
    return json.dumps({"name": call["function"]["name"], "parameters": _arguments(call)}, ensure_ascii=False)


def _tool_as_text(tool: Mapping[str, Any]) -> str:
    function = tool["function"]
    told = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
    return json.dumps(told, ensure_ascii=False)


def _text(message: Message) -> str:
    """What a message says: a text, or several in parts."""
    content: Any = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, Sequence) else [content]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise ValueError(f"messages has content {shown(content)} of role {message.get('role')}; expected a text, or parts of type text")
    return "".join(part["text"] for part in parts)


# Words that no template knows, and a call as templates quote it in their instructions: [func_name1(param1=value1).
_TRIED, _TRIED_RESULT = "quistel", "voramin"
_QUESTION = {"role": "user", "content": "Hello"}
_TOOL = {"type": "function", "function": {"name": _TRIED, "description": "", "parameters": {"type": "object", "properties": {}}}}
_PYTHON_CALL = re.compile(r"\[\w+\(\w+=")


def _answered(calls: int) -> list[dict[str, Any]]:
    """A conversation with this many calls at once, and their results."""
    function = {"name": _TRIED, "arguments": {"x": 1}}
    ids = [f"call_{number}" for number in range(calls)]
    said = {"role": "assistant", "content": "", "tool_calls": [{"id": each, "type": "function", "function": function} for each in ids]}
    return [_QUESTION, said, *({"role": "tool", "tool_call_id": each, "content": _TRIED_RESULT} for each in ids)]


def _rendered(chat: ChatFormat, messages: list[dict[str, Any]]) -> str:
    try:
        return chat.render(messages, tools=[_TOOL])
    except ChatError:
        return ""

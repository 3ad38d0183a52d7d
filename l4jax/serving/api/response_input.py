"""What a request of the Responses API says, in the form of chat completions: its items as messages, its tools, the choice of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from l4jax.serving.api.tools import ToolChoice, Tools
from l4jax.serving.errors import ApiError
from l4jax.text.tool_prompts import check_arguments, check_functions, check_name
from sharding.kinds import shown

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
"""Of messages. "developer" is OpenAI's later word for "system", which chat templates know."""
_TEXTS = ("input_text", "output_text")
_FUNCTION = ("name", "description", "parameters", "strict")


def messages_of(instructions: str | None, given: str | Sequence[Any]) -> list[dict[str, Any]]:
    """The conversation. Raises ApiError, which names the place, for an item that has no meaning here."""
    messages: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not given:
        raise ApiError("input has no items; expected at least one", param="input", code="invalid_value")
    reader = _Items(messages)
    for number, item in enumerate(given):
        reader.add(f"input[{number}]", item)
    if not messages:
        raise ApiError("input has only items of type reasoning, which are left out; give a message", param="input", code="invalid_value")
    return messages


def tools_of(given: Sequence[Any] | None, choice: ToolChoice | None, parallel: bool | None) -> Tools:
    """The tools that may be called. Raises ApiError for wrong ones."""
    functions = [(f"tools[{number}]", _function(f"tools[{number}]", tool)) for number, tool in enumerate(given or ())]
    try:
        check_functions(functions)
    except ValueError as error:
        raise _named(error) from error
    return Tools.chosen([{"type": "function", "function": function} for _, function in functions], _choice(choice), parallel)


def _function(where: str, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise _wrong(where, f"is {shown(tool)}; expected an object with type 'function' and a name")
    if tool.get("type") != "function":
        raise _wrong(f"{where}.type", f"is {shown(tool.get('type'))}, and the server runs no tools itself; expected 'function'")
    for name, value in tool.items():
        if name != "type" and name not in _FUNCTION and value not in (None, False):
            raise _wrong(f"{where}.{shown(name)[1:-1]}", f"is given; a function has {', '.join(_FUNCTION)}; leave it out")
    strict = tool.get("strict")
    if not isinstance(strict, bool | None):
        raise _wrong(f"{where}.strict", f"is {shown(strict)}; expected true or false")
    return {name: tool[name] for name in _FUNCTION if tool.get(name) is not None}


def _choice(choice: ToolChoice | None) -> ToolChoice | None:
    """The choice in the form of chat completions, which has a function's name in an object of its own."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        raise _wrong("tool_choice", f'is {shown(choice)}; expected none, auto, required or {{"type": "function", "name": ...}}')
    return {"type": "function", "function": {"name": choice["name"]}}


@dataclasses.dataclass
class _Items:
    """Adds items to messages. What one answer gave, a text and calls one after the other, is one message, as it was to the model."""

    messages: list[dict[str, Any]]
    calls: set[str] = dataclasses.field(default_factory=set)

    def add(self, where: str, item: Any) -> None:
        if not isinstance(item, Mapping):
            raise _wrong(where, f"is {shown(item)}; expected an object, with role and content for example")
        kind = item.get("type")
        if kind == "message" or (kind is None and "role" in item):
            self._message(where, item)
        elif kind == "function_call":
            self._call(where, item)
        elif kind == "function_call_output":
            self._output(where, item)
        elif kind == "item_reference" or (kind is None and "id" in item):
            raise _wrong(where, "is a reference to an item, and nothing is stored; give the item itself")
        elif kind != "reasoning":
            expected = "message, function_call, function_call_output or reasoning"
            raise _wrong(f"{where}.type", f"is {shown(kind)}; expected {expected}; leave the item out")
        # Items of type reasoning come from other models. Chat templates have no place for them, and no answer refers to them.

    def _message(self, where: str, item: Mapping[str, Any]) -> None:
        role = item.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise _wrong(f"{where}.role", f"is {shown(role)}; expected {', '.join(_ROLES)}")
        text = _text(f"{where}.content", item.get("content"))
        if role == "assistant" and self.messages and self.messages[-1].get("tool_calls"):
            self.messages[-1]["content"] = (self.messages[-1]["content"] or "") + text
        else:
            self.messages.append({"role": _ROLES[role], "content": text})

    def _call(self, where: str, item: Mapping[str, Any]) -> None:
        call_id, arguments = item.get("call_id"), item.get("arguments")
        if not isinstance(call_id, str) or not call_id or call_id in self.calls:
            raise _wrong(f"{where}.call_id", f"is {shown(call_id)}; expected a text that is this call's only")
        try:
            function = {"name": check_name(f"{where}.name", item.get("name")), "arguments": arguments}
            check_arguments(f"{where}.arguments", arguments)
        except ValueError as error:
            raise _named(error) from error
        self.calls.add(call_id)
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": None})
        self.messages[-1].setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})

    def _output(self, where: str, item: Mapping[str, Any]) -> None:
        call_id = item.get("call_id")
        if not isinstance(call_id, str) or call_id not in self.calls:
            raise _wrong(f"{where}.call_id", f"is {shown(call_id)}; expected the call_id of a function_call before it; give that item too")
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": _text(f"{where}.output", item.get("output"))})


def _text(where: str, content: Any) -> str:
    """What a content says: a text, or several in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise _wrong(where, f"is {shown(content)}; expected a text, or a list of parts of type {' or '.join(_TEXTS)}")
    for number, part in enumerate(content):
        each = f"{where}[{number}]"
        if not isinstance(part, Mapping):
            raise _wrong(each, f"is {shown(part)}; expected an object of type {' or '.join(_TEXTS)}")
        if part.get("type") not in _TEXTS:
            raise _wrong(f"{each}.type", f"is {shown(part.get('type'))}, and the model is given text only; expected {' or '.join(_TEXTS)}")
        if not isinstance(part.get("text"), str):
            raise _wrong(f"{each}.text", f"is {shown(part.get('text'))}; expected a text")
    return "".join(part["text"] for part in content)


def _wrong(where: str, what: str) -> ApiError:
    return ApiError(f"{where} {what}", param=where, code="invalid_value")


def _named(error: ValueError) -> ApiError:
    """A ValueError that begins with the place at fault."""
    return ApiError(str(error), param=str(error).split(" ", 1)[0], code="invalid_value")

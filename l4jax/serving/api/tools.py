"""Tools of a chat request: what the model is told of them, and its calls in the answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from l4jax.decoding.guide import Guide
from l4jax.serving.api.served import made_guide, new_id
from l4jax.serving.errors import ApiError
from l4jax.text.literals import Notation
from l4jax.text.tool_calls import ArgumentsPiece, CallStart, Event, TextPiece, ToolCallParser
from l4jax.text.tool_prompts import check_tools

ToolChoice = Literal["none", "auto", "required"] | dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tools:
    """The tools that an answer may call. ``given``: as the request has them.

    ``forced``: the answer must be a call. ``parallel``: it may have several. ``strict``: the arguments of its calls are what the tools'
    schemas describe; then calls stand at the beginning of an answer.
    """

    given: Sequence[Mapping[str, Any]]
    forced: bool
    parallel: bool
    strict: bool

    @classmethod
    def of(cls, tools: list[dict[str, Any]] | None, choice: ToolChoice | None, parallel: bool | None, messages: Sequence[Any]) -> Tools:
        """The tools of a request; none if it does not want them to be called. Raises ApiError for wrong ones."""
        try:
            check_tools(tools, messages)
        except ValueError as error:
            parameter = str(error).split(" ", 1)[0].partition("[")[0]
            raise ApiError(str(error), param=parameter, code="invalid_value") from error
        return cls.chosen(tools or [], choice, parallel)

    @classmethod
    def chosen(cls, given: Sequence[Mapping[str, Any]], choice: ToolChoice | None, parallel: bool | None) -> Tools:
        """The tools, which have been checked; none if they are not to be called. Raises ApiError for a wrong choice."""
        name = _named(choice) if isinstance(choice, dict) else None
        if choice not in (None, "none", "auto") and not given:
            raise ApiError("tool_choice asks for a call, and there are no tools; give tools, or leave it out", param="tool_choice")
        if name is not None:
            given = [tool for tool in given if tool["function"]["name"] == name]
            if not given:
                raise ApiError(
                    f"tool_choice names {name!r}, which is none of the tools; expected the name of one of them", param="tool_choice"
                )
        if choice == "none":
            given = []
        forced = choice not in (None, "none", "auto")
        strict = forced or any(tool["function"].get("strict") for tool in given)
        return cls(given, forced, parallel is not False, strict)

    @property
    def names(self) -> list[str]:
        """The names of the tools that may be called."""
        return [tool["function"]["name"] for tool in self.given]

    def guide(self, notation: Notation) -> Guide:
        """What keeps calls strict. ``notation``: in which the model is asked to write them."""
        if not self.forced and notation == "python":
            raise ApiError(
                "tools are strict, and this model writes calls as Python, for which that cannot be enforced; leave strict out, or ask "
                "for a call with tool_choice",
                param="tools",
                code="unsupported_parameter",
            )
        calls = "call" if self.forced or not self.parallel else r"call (/[ \n;]*/ call)*"
        # Words may follow each other freely, as long as they do not begin as a call does.
        words = "" if self.forced else r" | /\s*([^\s{\[<](?s:.)*)?/"
        rules = [f"start: {calls}{words}", f"call: {' | '.join(f'call_{number}' for number in range(len(self.given)))}"]
        for number, tool in enumerate(self.given):
            function = tool["function"]
            schema = {**(function.get("parameters") or {"properties": {}, "additionalProperties": False}), "type": "object"}
            opening = json.dumps(f'{{"name": "{function["name"]}", "parameters": ')
            rules += [f'call_{number}: {opening} arguments_{number} "}}"', f"arguments_{number}: %json {json.dumps(schema)}"]
        return made_guide(Guide.grammar, "\n".join(rules), "tools")


def _named(choice: Mapping[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise ApiError(
            'tool_choice is an object; expected none, auto, required or {"type": "function", "function": {"name": ...}}',
            param="tool_choice",
            code="invalid_value",
        )
    return name


class AnswerEvents:
    """One answer as it grows: its text and its calls of tools, in order."""

    def __init__(self, tools: Tools) -> None:
        self._parallel = tools.parallel
        self._parser = ToolCallParser(tools.names) if tools.given else None
        self._undecided = "" if tools.strict else None  # white space before it is known whether the answer begins with a call
        self._calls = 0

    def push(self, text: str, *, done: bool) -> list[Event]:
        """Add text; ``done``: it is the last. Returns what is new of the text and of the calls that count."""
        if self._undecided is not None:
            text = self._undecided + text
            if not text.strip() and not done:
                self._undecided = text
                return []
            self._undecided = None
            if text.lstrip()[:1] not in ("{", "[", "<"):
                self._parser = None
        if self._parser is None:
            return [TextPiece(text)] if text else []
        events = []
        for event in self._parser.push(text) + (self._parser.finish() if done else []):
            match event:
                case CallStart(index) if index > 0 and not self._parallel:
                    continue
                case CallStart(index):
                    self._calls += 1
                case ArgumentsPiece(index) if index >= self._calls:
                    continue
            events.append(event)
        return events

    def is_whole(self, index: int) -> bool:
        """Whether the arguments of a call are a whole object, as far as they are known to have ended."""
        return self._parser is not None and index not in self._parser.incomplete_calls

    @property
    def has_called(self) -> bool:
        """Whether it has calls, and all of them are whole: then it waits for their results."""
        return self._calls > 0 and all(map(self.is_whole, range(self._calls)))


class ToolAnswer:
    """One answer as it grows: its text, and its calls of tools in OpenAI's form."""

    def __init__(self, tools: Tools) -> None:
        self._events = AnswerEvents(tools)
        self._text: list[str] = []
        self.calls: list[dict[str, Any]] = []

    @property
    def message(self) -> dict[str, Any]:
        """The whole message."""
        text = "".join(self._text)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if self.calls else ""), "refusal": None}
        if self.calls:
            message["tool_calls"] = self.calls
        return message

    def push(self, text: str, *, done: bool) -> tuple[str, list[dict[str, Any]]]:
        """Add text; ``done``: it is the last. Returns what may be shown of it, and fragments of calls, as streams have them."""
        shown, fragments = "", []
        for event in self._events.push(text, done=done):
            match event:
                case TextPiece(piece):
                    shown += piece
                case CallStart(index, name):
                    function = {"name": name, "arguments": ""}
                    call = {"id": new_id("call-"), "type": "function", "function": function}
                    self.calls.append(call)
                    fragments.append({"index": index, **call, "function": {**function}})
                case ArgumentsPiece(index, piece):
                    self.calls[index]["function"]["arguments"] += piece
                    fragments.append({"index": index, "function": {"arguments": piece}})
        self._text.append(shown)
        return shown, fragments

    def finish_reason(self, reason: str) -> str:
        """OpenAI's word for how the answer ended."""
        return "tool_calls" if reason == "stop" and self._events.has_called else reason

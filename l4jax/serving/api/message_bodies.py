"""Requests in Anthropic's form, as chat requests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import msgspec

from l4jax.serving import parameters
from l4jax.serving.api.chat import ChatBody, JsonSchema, ResponseFormat
from l4jax.serving.api.conversation import check_length
from l4jax.serving.api.tools import ToolChoice
from l4jax.serving.errors import ApiError
from l4jax.text.tool_prompts import check_name, check_names
from sharding.kinds import shown


class TokenCountBody(msgspec.Struct, kw_only=True):
    """The parameters of ``/v1/messages/count_tokens`` that are honoured: those that a prompt depends on."""

    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class MessagesBody(TokenCountBody, kw_only=True):
    """The parameters of ``/v1/messages`` that are honoured."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


class MessagesChat(ChatBody, kw_only=True):
    """A chat request that was made of one in Anthropic's form, and names its parameters as the client does."""

    stop_name: ClassVar[str] = "stop_sequences"
    format_name: ClassVar[str] = "output_config.format"


def parsed_messages(raw: bytes, *, ignore_unknown: bool) -> MessagesChat:
    """Read the body of a request to ``/v1/messages``. Raises ApiError for one that is no request."""
    body = parameters.parsed(raw, MessagesBody, parameters.MESSAGES_NOT_HONOURED, ignore_unknown=ignore_unknown)
    chat = _chat(body, ignore_unknown=ignore_unknown)
    chat.max_tokens, chat.stop, chat.stream = body.max_tokens, body.stop_sequences, body.stream
    chat.temperature, chat.top_k, chat.top_p = body.temperature, body.top_k, body.top_p
    return chat


def parsed_token_count(raw: bytes, *, ignore_unknown: bool) -> MessagesChat:
    """Read the body of a request to ``/v1/messages/count_tokens``. Raises ApiError for one that is no request."""
    body = parameters.parsed(raw, TokenCountBody, parameters.MESSAGES_NOT_HONOURED, ignore_unknown=ignore_unknown)
    return _chat(body, ignore_unknown=ignore_unknown)


class _Turn(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class _Text(msgspec.Struct):
    type: str
    text: str


class _ToolUse(msgspec.Struct):
    type: str
    id: str
    name: str
    input: dict[str, Any]


class _ToolResult(msgspec.Struct):
    type: str
    tool_use_id: str
    content: str | list[dict[str, Any]] | None = None
    is_error: bool | None = None


class _Tool(msgspec.Struct):
    name: str
    input_schema: dict[str, Any]
    type: str | None = None
    description: str | None = None
    strict: bool | None = None


class _ToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Format(msgspec.Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class _OutputConfig(msgspec.Struct):
    format: _Format | None = None


_BLOCKS: dict[str, type[msgspec.Struct]] = {"text": _Text, "tool_use": _ToolUse, "tool_result": _ToolResult}
_BLOCKS_OF = {"user": ("text", "tool_result"), "assistant": ("text", "tool_use"), "system": ("text",)}


def _chat(body: TokenCountBody, *, ignore_unknown: bool) -> MessagesChat:
    check_length("messages", len(body.messages), "messages")
    conversation = _Conversation(ignore_unknown)
    if body.system is not None:
        conversation.add_text("system", conversation.text("system", body.system))
    if not body.messages:
        raise ApiError("messages is empty; expected at least one message", param="messages", code="invalid_value")
    for number, message in enumerate(body.messages):
        conversation.add(f"messages[{number}]", message)
    chat = MessagesChat(messages=conversation.whole(), model=body.model)
    final = chat.messages[-1]
    if final["role"] == "assistant":
        if final.get("tool_calls") or not final["content"]:
            raise ApiError(
                f"messages[{len(body.messages) - 1}] is the assistant's and the last, so the answer continues its text; expected some text "
                "and no tool_use; add the result of the call, or what the user says",
                param="messages",
                code="invalid_value",
            )
        chat.continue_final_message = True
    convert = functools.partial(parameters.converted, ignore_unknown=ignore_unknown)
    if body.tools is not None:
        chat.tools = _tools(body.tools, ignore_unknown)
    if body.tool_choice is not None:
        choice = convert(body.tool_choice, _ToolChoice, {}, where="tool_choice")
        chat.tool_choice = _choice(choice)
        chat.parallel_tool_calls = not choice.disable_parallel_tool_use
    if body.output_config is not None:
        not_honoured = parameters.MESSAGE_PARTS_NOT_HONOURED["output_config"]
        config = convert(body.output_config, _OutputConfig, not_honoured, where="output_config")
        if config.format is not None:
            chat.response_format = ResponseFormat("json_schema", JsonSchema("format", config.format.schema))
    return chat


class _Conversation:
    """Messages in OpenAI's form, made of Anthropic's: the results of tools are messages of their own."""

    def __init__(self, ignore_unknown: bool) -> None:
        self._convert = functools.partial(
            parameters.converted, not_honoured=parameters.MESSAGE_PARTS_NOT_HONOURED["block"], ignore_unknown=ignore_unknown
        )
        self._calls: dict[str, None] = {}  # the ids of all so far
        self._answered: set[str] = set()
        self._texts: list[str] = []  # of the last message
        self.messages: list[dict[str, Any]] = []

    def add(self, where: str, message: dict[str, Any]) -> None:
        """Add a message. Raises ApiError for one that is wrong, and for blocks that are not supported."""
        turn = self._convert(message, _Turn, where=where, not_honoured={})
        given = [{"type": "text", "text": turn.content}] if isinstance(turn.content, str) else turn.content
        blocks = self._blocks(f"{where}.content", given, _BLOCKS_OF[turn.role])
        texts: list[str] = []
        calls: list[dict[str, Any]] = []
        for number, block in enumerate(blocks):
            place = f"{where}.content[{number}]"
            match block:
                case _Text():
                    texts.append(block.text)
                case _ToolUse():
                    calls.append(self._call(place, block))
                case _ToolResult():
                    if texts:
                        self.add_text(turn.role, "".join(texts))
                    texts = []
                    self._join()
                    self.messages.append(self._result(place, block))
        if texts or calls or not blocks:
            self.add_text(turn.role, "".join(texts), calls)

    def add_text(self, role: str, text: str, calls: Sequence[dict[str, Any]] = ()) -> None:
        """Add what somebody says; successive messages of one role are one turn."""
        if not (self.messages and self.messages[-1]["role"] == role):
            self._join()
            self.messages.append({"role": role, "content": ""})
        if text:
            self._texts.append(text)
        if calls:
            self.messages[-1].setdefault("tool_calls", []).extend(calls)

    def _join(self) -> None:
        """The last message is complete."""
        if self._texts:
            self.messages[-1]["content"] = "\n\n".join(self._texts)
        self._texts = []

    def whole(self) -> list[dict[str, Any]]:
        """All messages, after the last has been added."""
        self._join()
        return self.messages

    def text(self, where: str, content: str | list[dict[str, Any]]) -> str:
        """The text of blocks that may be nothing else."""
        if isinstance(content, str):
            return content
        return "".join(block.text for block in self._blocks(where, content, ("text",)))

    def _blocks(self, where: str, blocks: list[dict[str, Any]], kinds: Sequence[str]) -> list[Any]:
        converted = []
        for number, block in enumerate(blocks):
            place = f"{where}[{number}]"
            kind = block.get("type")
            if not isinstance(kind, str) or kind not in kinds:
                raise ApiError(
                    f"{place}.type is {shown(kind)}; expected {' or '.join(kinds)}, which is all that is supported here",
                    param=f"{place}.type",
                    code="unsupported_parameter",
                )
            converted.append(self._convert(block, _BLOCKS[kind], where=place))
        return converted

    def _call(self, place: str, block: _ToolUse) -> dict[str, Any]:
        _checked(f"{place}.name", lambda: check_name(f"{place}.name", block.name))
        if not block.id or block.id in self._calls:
            raise _wrong(f"{place}.id", block.id, "a text that is this call's only")
        self._calls[block.id] = None
        return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}

    def _result(self, place: str, block: _ToolResult) -> dict[str, Any]:
        if block.tool_use_id not in self._calls:
            known = (
                f"the id of an earlier tool_use ({shown(', '.join(self._calls))})"
                if self._calls
                else "a tool_use before it, and there is none"
            )
            raise _wrong(f"{place}.tool_use_id", block.tool_use_id, known)
        if block.tool_use_id in self._answered:
            raise _wrong(f"{place}.tool_use_id", block.tool_use_id, "one result for each tool_use, and there is an earlier one")
        self._answered.add(block.tool_use_id)
        text = "" if block.content is None else self.text(f"{place}.content", block.content)
        # Chat templates have no other place to say it.
        return {"role": "tool", "tool_call_id": block.tool_use_id, "content": f"Error: {text}" if block.is_error else text}


def _tools(given: list[dict[str, Any]], ignore_unknown: bool) -> list[dict[str, Any]]:
    tools: list[_Tool] = []
    for number, tool in enumerate(given):
        where = f"tools[{number}]"
        if (kind := tool.get("type")) not in (None, "custom"):
            raise ApiError(
                f"{where}.type is {shown(kind)}, and the server has no tools of its own; expected custom",
                param=f"{where}.type",
                code="unsupported_parameter",
            )
        not_honoured = parameters.MESSAGE_PARTS_NOT_HONOURED["tool"]
        tools.append(parameters.converted(tool, _Tool, not_honoured, where=where, ignore_unknown=ignore_unknown))
    _checked("tools", lambda: check_names([(f"tools[{number}].name", tool.name) for number, tool in enumerate(tools)]))
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema, "strict": tool.strict},
        }
        for tool in tools
    ]


def _choice(choice: _ToolChoice) -> ToolChoice:
    if choice.type == "tool":
        if choice.name is None:
            raise ApiError("tool_choice.name is missing; it is required", param="tool_choice.name", code="missing_required_parameter")
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _checked(param: str, check: Callable[[], object]) -> None:
    try:
        check()
    except ValueError as error:
        raise ApiError(str(error), param=param, code="invalid_value") from error


def _wrong(param: str, value: object, expected: str) -> ApiError:
    return ApiError(f"{param} is {shown(value)}; expected {expected}", param=param, code="invalid_value")

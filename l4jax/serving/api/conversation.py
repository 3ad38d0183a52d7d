"""What the APIs of conversations share: how a prompt is made, and which parameter says what an answer looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from l4jax.decoding.guide import Guide
from l4jax.serving.api.served import Served, StructuredOutputs
from l4jax.serving.api.tools import Tools
from l4jax.serving.errors import ApiError
from l4jax.text.chat import ChatOptions

MAX_MESSAGES = 2048


def guide_of(
    served: Served, tools: Tools, structured_outputs: StructuredOutputs | None, of_format: Guide | None, format_name: str
) -> tuple[Guide, str] | None:
    """What an answer must look like, and the parameter that says so; None if it is free.

    ``of_format``: what the API's own parameter for it, ``format_name``, asks for. Raises ApiError if several parameters say it.
    """
    given = {"structured_outputs": structured_outputs, format_name: of_format, "tools": tools.given}
    if len(names := [name for name, value in given.items() if value]) > 1:
        what = " and ".join(names)
        raise ApiError(f"{what} are given together, and each says what the answer looks like; leave one out", param=names[0])
    if of_format is not None:
        return of_format, format_name
    if tools.strict and served.text.chat_format is not None:
        return tools.guide(served.tool_prompt.notation), "tools"
    return None if structured_outputs is None else (structured_outputs.guide, "structured_outputs")


def check_length(parameter: str, length: int, what: str) -> None:
    """Raise ApiError for a conversation that has too many messages, or items of another name."""
    if length > MAX_MESSAGES:
        raise ApiError(f"{parameter} has {length} {what}; expected at most {MAX_MESSAGES}; shorten the conversation", param=parameter)


def conversation_prompt(
    served: Served, messages: Sequence[Mapping[str, Any]], tools: Tools, options: ChatOptions, parameter: str
) -> list[int]:
    """The tokens of a conversation in the form of chat completions. ``parameter``: what has the messages in the API's own form.

    Raises ApiError for a conversation that the chat template cannot format.
    """
    if served.text.chat_format is None:
        raise ApiError("the model has no chat template; use /v1/completions with a prompt in the model's own format")
    served.check_characters(_characters([messages, tools.given, options.get("chat_template_kwargs")]), parameter)
    try:
        # Without tools or calls the template gets the messages as they are.
        if tools.given or any(message.get("tool_calls") or message.get("role") == "tool" for message in messages):
            messages, told = served.tool_prompt.prepare(messages, tools.given)
            options = {**options, "tools": told}
            served.check_characters(_characters(messages), parameter)  # results are told with their calls
        return served.maker.encode_chat(messages, options)
    except ValueError as error:
        raise served.error(error, parameter) from error


def _characters(value: object) -> int:
    """How many characters the texts in a JSON value have."""
    if isinstance(value, str):
        return len(value)
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, children))

"""What the server does with parameters that it does not honour, and with bodies that are no requests."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

import msgspec

from l4jax.serving.errors import ApiError
from sharding.kinds import shown

Policy = Literal["no effect", "refused"]
LOGGER = logging.getLogger("l4jax.serving")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter. ``values``: those of a refused parameter that are accepted, as null always is. ``why``: for docs and errors."""

    policy: Policy
    why: str
    values: tuple[object, ...] = ()


def _no_effect(why: str) -> Parameter:
    return Parameter("no effect", why)


def _refused(why: str, *values: object) -> Parameter:
    return Parameter("refused", why, values)


_LABELS = {
    "user": _no_effect("a label for the client's own use"),
    "metadata": _no_effect("a label for the client's own use"),
    "safety_identifier": _no_effect("a label for the client's own use"),
    "prompt_cache_key": _no_effect("prefixes are found by their tokens"),
    "prompt_cache_retention": _no_effect("prefixes stay until their memory is needed"),
    "prompt_cache_options": _no_effect("prefixes are found by their tokens"),
    "service_tier": _refused("there is one tier", "auto", "default"),
    "store": _refused("nothing is stored", False),
}

CHAT_NOT_HONOURED: Mapping[str, Parameter] = {
    **_LABELS,
    "audio": _refused("there is no audio"),
    "modalities": _refused("answers are text", ["text"]),
    "moderation": _refused("there is no moderation"),
    "prediction": _refused("predicted outputs are not supported"),
    "web_search_options": _refused("the server fetches nothing"),
    "functions": _refused("tools have taken its place"),
    "function_call": _refused("tool_choice has taken its place", "none"),
    "reasoning_effort": _refused("the models have no separate reasoning", "none"),
    "verbosity": _refused("the models have no setting for it"),
}
"""Parameters of /v1/chat/completions that are not honoured."""

COMPLETION_NOT_HONOURED: Mapping[str, Parameter] = {
    **_LABELS,
    "suffix": _refused("the models do not fill in the middle", ""),
    "best_of": _refused("answers are not ranked (ask for n)", 1),
}
"""Parameters of /v1/completions that are not honoured."""

RESPONSES_NOT_HONOURED: Mapping[str, Parameter] = {
    **{name: parameter for name, parameter in _LABELS.items() if name != "metadata"},
    "access_programs": _refused("there are no access programs"),
    "background": _refused("answers are not computed in the background", False),
    "background_options": _refused("answers are not computed in the background"),
    "context_management": _refused("the input is not compacted"),
    "conversation": _refused("nothing is stored (send the items of the conversation as input)"),
    "image": _refused("the model is given text only"),
    "max_tool_calls": _no_effect("it counts calls of built-in tools, and there are none"),
    "moderation": _refused("there is no moderation"),
    "previous_response_id": _refused("nothing is stored (send the items of the conversation as input)"),
    "prompt": _refused("there are no stored prompts"),
    "reasoning": _refused("the models have no separate reasoning", {}, {"effort": "none"}),
    "text.verbosity": _refused("the models have no setting for it"),
    "truncation": _refused("the input is never cut", "disabled"),
}
"""Parameters of /v1/responses that are not honoured."""
MESSAGES_NOT_HONOURED: Mapping[str, Parameter] = {
    "billing_policy": _refused("the server bills nothing"),
    "cache_control": _no_effect("prefixes are found by their tokens"),
    "compaction": _refused("conversations are not shortened"),
    "container": _refused("the server runs no code"),
    "context_management": _refused("conversations are not shortened"),
    "diagnostics": _refused("the cache keeps no record of requests"),
    "fallback_credit_token": _refused("there is one model"),
    "fallbacks": _refused("there is one model", []),
    "inference_geo": _refused("the server is in one place"),
    "mcp_servers": _refused("the server fetches nothing", []),
    "metadata": _no_effect("a label for the client's own use"),
    "service_tier": _refused("there is one tier", "auto", "standard_only"),
    "speed": _refused("there is one speed", "standard"),
    "thinking": _refused("the models have no separate thinking", {"type": "disabled"}),
    "thread": _refused("nothing is stored"),
}
"""Parameters of /v1/messages and /v1/messages/count_tokens that are not honoured."""

MESSAGE_PARTS_NOT_HONOURED: Mapping[str, Mapping[str, Parameter]] = {
    "block": {
        "cache_control": _no_effect("prefixes are found by their tokens"),
        "caller": _refused("only the model calls tools", {"type": "direct"}),
        "citations": _refused("the models do not cite", []),
        "toolset_name": _refused("there are no sets of tools"),
    },
    "tool": {
        "allowed_callers": _refused("only the model calls tools", ["direct"]),
        "cache_control": _no_effect("prefixes are found by their tokens"),
        "defer_loading": _refused("the model is told of all tools", False),
        "eager_input_streaming": _no_effect("inputs are streamed as they come"),
        "input_examples": _refused("the model is not shown them (put them into the description)", []),
    },
    "output_config": {"effort": _refused("the models have no setting for it")},
}
"""The same of content blocks, tools and ``output_config``."""


def parsed[Body: msgspec.Struct](raw: bytes, kind: type[Body], not_honoured: Mapping[str, Parameter], *, ignore_unknown: bool) -> Body:
    """Read a request's JSON body. Raises :class:`ApiError`, which names the parameter, for one that is wrong, refused or unknown."""
    try:
        given = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ApiError(f"the body is not valid JSON ({_lowered(str(error))}); send one JSON object") from None
    if _is_deeper(given, _MAX_DEPTH):
        raise ApiError(f"the body is nested more than {_MAX_DEPTH} levels deep; send simpler JSON")
    if not isinstance(given, dict):
        raise ApiError(f"the body is a JSON {_JSON_NAMES.get(type(given), 'value')}; send one JSON object")
    return converted(given, kind, not_honoured, ignore_unknown=ignore_unknown)


def converted[Part: msgspec.Struct](
    given: dict[str, Any], kind: type[Part], not_honoured: Mapping[str, Parameter], *, ignore_unknown: bool, where: str = ""
) -> Part:
    """Convert a JSON object, a request or a part of one at ``where`` in it, as :func:`parsed` does."""
    ignored: list[str] = []
    _drop_unknown(given, _fields(kind), not_honoured, f"{where}." if where else "", ignored if ignore_unknown else None)
    if ignored:
        LOGGER.warning("unknown parameters are ignored: %s", shown(ignored))
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise _wrong(given, str(error), where) from None


def _drop_unknown(
    given: dict[str, Any],
    honoured: Mapping[str, Any],
    not_honoured: Mapping[str, Parameter],
    where: str,
    ignored: list[str] | None,
    inner: str = "",
) -> None:
    """Drop what is not honoured. Raises ApiError for a value that is refused, and for unknown names unless they are to be ignored.

    ``where``: the path of the part of the request that ``not_honoured`` speaks of; ``inner``: the path of ``given`` in that part.
    """
    for name in list(given):
        value = given[name]
        if name in honoured:
            if isinstance(value, dict) and honoured[name]:
                _drop_unknown(value, honoured[name], not_honoured, where, ignored, f"{inner}{name}.")
            continue
        del given[name]
        named = f"{where}{inner}{name}"
        parameter = not_honoured.get(f"{inner}{name}")
        if parameter is None:
            named = named[:64]
            if ignored is None:
                raise ApiError(f"{shown(named)} is not a parameter of this route; leave it out", param=named, code="unknown_parameter")
            ignored.append(named)
        elif parameter.policy == "refused" and value is not None and not _among(value, parameter.values):
            expected = "; leave it out" if not parameter.values else f"; expected {' or '.join(map(_as_json, parameter.values))}"
            raise ApiError(f"{named} is {_short(value)}, and {parameter.why}{expected}", param=named, code="unsupported_parameter")


_MAX_DEPTH = 64


def _is_deeper(value: object, levels: int) -> bool:
    """Whether lists and objects are nested more than ``levels`` levels deep."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(child, levels - 1) for child in children if isinstance(child, dict | list))


def _among(value: object, values: Collection[object]) -> bool:
    """Whether a value is one of these, of the same kind: to Python false equals 0."""
    return any(type(value) is type(other) and value == other for other in values)


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> Mapping[str, Mapping[str, Any]]:
    """The names of a body's parameters; those that are objects have names of their own."""
    names: dict[str, Mapping[str, Any]] = {}
    for field in msgspec.structs.fields(kind):
        structs = [one for one in getattr(field.type, "__args__", ()) if isinstance(one, type) and issubclass(one, msgspec.Struct)]
        names[field.encode_name] = _fields(structs[0]) if structs else {}
    return names


_JSON_NAMES: Mapping[type, str] = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def _wrong(given: Mapping[str, Any], message: str, where: str) -> ApiError:
    """The error for a value of the wrong kind, or out of range, in the object at ``where``."""
    match = re.fullmatch(r"(.*?)(?:, got `[^`]*`)?(?: - at `\$\.?(.*)`)?", message, re.DOTALL)
    expected, path = (match[1], match[2] or "") if match else (message, "")
    place = ".".join(filter(None, (where, path)))
    if missing := re.fullmatch(r"Object missing required field `(.*)`", expected):
        name = f"{place}.{missing[1]}" if place else missing[1]
        return ApiError(f"{name} is missing; it is required", param=name, code="missing_required_parameter")
    name = re.match(r"\w*", path)
    top = name[0] if name else ""
    value = f" ({top} is {_short(given[top])})" if top in given else ""
    for name, word in _JSON_WORDS:
        expected = re.sub(name, word, expected)
    return ApiError(f"{place or 'the body'} is wrong: {_lowered(expected)}{value}", param=place or None, code="invalid_value")


_JSON_WORDS = (
    ("`", ""),
    (r"\bint\b", "integer"),
    (r"\bstr\b", "string"),
    (r"\bfloat\b", "number"),
    (r"\bbool\b", "boolean"),
    (r" \| ", " or "),
)
"""msgspec's names of kinds, and JSON's."""


def _short(value: object) -> str:
    """A value as JSON, cut short."""
    text = _as_json(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _as_json(value: object) -> str:
    return msgspec.json.encode(value).decode()

"""What is asked of a server before it is loaded, so that wrong options end in one line and not in many failed requests."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from l4jax.bench.answer import Answer
from l4jax.bench.client import Cancel, Server, address_of, get, stream
from l4jax.bench.requests import PATHS, Content, Requests

_FEW_TOKENS = 8
"""Of the first answer: enough to see text, its end and its usage."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """A server that answers. ``server``: with its address; ``content``: with the model's name; ``version``: the server's, if it tells;
    ``pace``: a short answer.
    """

    server: Server
    content: Content
    version: str | None
    pace: Answer


async def check(server: Server, content: Content, timeout_s: float) -> Checked:
    """Find the model, and make the shortest and the longest of the requests.

    An empty ``content.model`` stands for the only model that is served. Raises ValueError if the server or the model is not there, or if it
    does not answer the requests as a measurement needs.
    """
    where = f"http://{server.host}:{server.port}{server.base}"
    try:
        server = await address_of(server)
    except OSError as error:
        raise ValueError(f"nothing listens at {where} ({error}); start a server there, or correct --url") from error
    names = _names(await get(server, "/v1/models", timeout_s=timeout_s), where)
    if content.model and content.model not in names:
        raise ValueError(f"{where} has no model {content.model}; expected --model with one of: {', '.join(names)}")
    if not content.model and len(names) != 1:
        raise ValueError(f"{where} serves several models; expected --model with one of: {', '.join(names)}")
    content = dataclasses.replace(content, model=content.model or names[0])
    path, requests = PATHS[content.api], Requests(content)
    pace = await stream(server, path, requests.shortest(min(_FEW_TOKENS, content.max_tokens.high)), timeout_s=timeout_s)
    _refuse(
        pace, f"{where} cannot answer a short request", "correct --token-ids or the prompts, leave out --ignore-eos, or try another --api"
    )
    at_once = Cancel(in_stream=True, seconds=0.0)
    longest = await stream(server, path, requests.longest(), timeout_s=timeout_s, cancel=at_once)
    _refuse(longest, f"{where} cannot answer the longest request", "correct --prompt-tokens, --max-tokens, --token-ids or the prompts")
    return Checked(server, content, _version(await get(server, "/version", timeout_s=timeout_s)), pace)


def _names(answer: Answer, where: str) -> list[str]:
    """The served models."""
    _refuse(answer, f"{where}/v1/models gives no list of models", "correct --url or --api-key")
    names = [entry.get("id") for entry in _fields(answer).get("data") or [{}] if isinstance(entry, dict)]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{where}/v1/models gives no list of models; expected a server with OpenAI's API; correct --url")
    return [str(name) for name in names]


def _version(answer: Answer) -> str | None:
    version = _fields(answer).get("version") if answer.failure is None else None
    return version if isinstance(version, str) else None


def _fields(answer: Answer) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _refuse(answer: Answer, what: str, advice: str) -> None:
    if answer.failure is not None:
        raise ValueError(f"{what} ({answer.failure.kind}: {answer.failure.message}); {advice}")

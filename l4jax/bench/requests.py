"""What is sent.

Every request is drawn from a generator of its own, seeded with its number: two runs with the same options send the same requests in the
same order, however fast the server is and however many requests it gets. Requests that warm up are numbered apart.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from pathlib import Path
from typing import Any, Self

import msgspec

from l4jax.files import FileError, parse_json, read_text

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
"""The route of each API."""
MOST_TOKENS = 10_000_000
_TEXT = (
    "the of and to in is was for on that with as by at from his it an are were which this be or has had first one their its not but who"
    " they have two her she been other when time there all during after into out up more no new some can only time years many over then"
    " such world three about these would may states city used most made well year where people day high way water life house school"
)
_WORDS = _TEXT.split()
"""One token each in most vocabularies."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Whole numbers from ``low`` to ``high``, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, option: str, least: int = 1) -> Self:
        """The range of an option such as ``64:512`` or ``64``. Raises ValueError for anything else."""
        found = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text, re.ASCII)
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if not least <= low <= high <= MOST_TOKENS:
            raise ValueError(f"{option} is {text!r}; expected a number or LOW:HIGH, from {least} to {MOST_TOKENS:,}, the lower one first")
        return cls(low, high)

    def draw(self, generator: random.Random) -> int:
        """One of the numbers; each doubling of the range is as likely as any other (log-uniform)."""
        low, high = math.log(self.low), math.log(self.high + 1)
        return min(max(int(math.exp(low + (high - low) * generator.random())), self.low), self.high)


@dataclasses.dataclass(frozen=True)
class Content:
    """What requests are made of.

    ``prompts``: requests' fields ``prompt`` or ``messages``, sent in turn; None for random prompts. ``shared_prefix``: the share of
    random prompts that have the same ``shared_prefix_tokens`` before their own. ``cancel``: the share of requests that are cancelled.
    """

    api: str
    model: str
    seed: int = 0
    prompt_tokens: Range = Range(512, 512)
    max_tokens: Range = Range(128, 128)
    token_ids: Range = Range(1000, 30_000)
    shared_prefix: float = 0.0
    shared_prefix_tokens: int = 0
    prompts: list[dict[str, Any]] | None = None
    cancel: float = 0.0
    temperature: float = 0.0
    ignore_eos: bool = False


@dataclasses.dataclass(frozen=True)
class Planned:
    """A request. ``cancel_in_stream``: cancelled after (True) or before (False) its first text, or not at all (None).

    ``cancel_part``: of the time that an answer takes until its first text, or from there to its end, the part after which it is
    cancelled.
    """

    body: bytes
    max_tokens: int
    cancel_in_stream: bool | None
    cancel_part: float


class Requests:
    """The requests by number."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self._prefix = self._random(content.shared_prefix_tokens, random.Random(f"{content.seed} prefix"))

    def planned(self, phase: str, number: int) -> Planned:
        """A request of a phase."""
        content, generator = self._content, random.Random(f"{self._content.seed} {phase} {number}")
        prompt_tokens, max_tokens = content.prompt_tokens.draw(generator), content.max_tokens.draw(generator)
        shares, cancels = generator.random() < content.shared_prefix, generator.random() < content.cancel
        in_stream, part = generator.random() < 0.5, generator.random()
        if content.prompts is None:
            fields = self._fields([*(self._prefix if shares else ()), *self._random(prompt_tokens, generator)])
        else:
            fields = content.prompts[number % len(content.prompts)]
        return Planned(self._body(fields, max_tokens), max_tokens, in_stream if cancels else None, part)

    def shortest(self, max_tokens: int) -> bytes:
        """A request with the shortest prompt."""
        content = self._content
        length = content.prompt_tokens.low
        given = None if content.prompts is None else min(content.prompts, key=_size)
        return self._body(given or self._fields(self._random(length, random.Random(f"{content.seed} shortest"))), max_tokens)

    def longest(self) -> bytes:
        """A request with the longest prompt and the most tokens of answer."""
        content = self._content
        length = content.prompt_tokens.high + (content.shared_prefix_tokens if content.shared_prefix else 0)
        given = None if content.prompts is None else max(content.prompts, key=_size)
        return self._body(given or self._fields(self._random(length, random.Random(f"{content.seed} longest"))), content.max_tokens.high)

    def _random(self, length: int, generator: random.Random) -> list[Any]:
        """Token ids for completions, words for chat."""
        low, high = (
            (self._content.token_ids.low, self._content.token_ids.high) if self._content.api == "completions" else (0, len(_WORDS) - 1)
        )
        drawn = [low + value % (high + 1 - low) for value in memoryview(generator.randbytes(4 * length)).cast("I")]
        return drawn if self._content.api == "completions" else [_WORDS[value] for value in drawn]

    def _fields(self, prompt: list[Any]) -> dict[str, Any]:
        if self._content.api == "completions":
            return {"prompt": prompt}
        return {"messages": [{"role": "user", "content": " ".join(prompt)}]}

    def _body(self, fields: dict[str, Any], max_tokens: int) -> bytes:
        content = self._content
        settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": content.temperature}
        if content.ignore_eos:
            settings["ignore_eos"] = True  # left out otherwise: servers that do not know it may refuse it
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        return msgspec.json.encode({"model": content.model, **fields, **settings, **streamed})


def _size(fields: dict[str, Any]) -> int:
    return len(msgspec.json.encode(fields))


def read_prompts(path: Path, api: str) -> list[dict[str, Any]]:
    """The prompts of a file of JSON lines, as fields of requests; blank lines are skipped.

    For chat, a ``prompt`` becomes a user's message. Raises ValueError with the line's number for a line without a prompt for the API.
    """
    expected = '{"prompt": "..."} or {"messages": [...]}' if api == "chat" else '{"prompt": "..."}, a text or token ids'
    found: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path, f"expected lines of {expected}").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number},"
        fields = parse_json(line, where, f"expected {expected}")
        prompt, messages = (fields.get("prompt"), fields.get("messages")) if isinstance(fields, dict) else (None, None)
        if api == "chat" and isinstance(messages, list) and messages:
            found.append({"messages": messages})
        elif api == "chat" and isinstance(prompt, str) and prompt:
            found.append({"messages": [{"role": "user", "content": prompt}]})
        elif api == "completions" and isinstance(prompt, str | list) and prompt:
            found.append({"prompt": prompt})
        else:
            raise FileError(f"{where} has no prompt for --api {api}; expected {expected}")
    if not found:
        raise FileError(f"{path} is empty; expected lines of {expected}")
    return found

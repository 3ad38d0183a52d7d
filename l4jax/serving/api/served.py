"""What all APIs know of the served model, and how they make its requests."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from l4jax.config import ModelConfig
from l4jax.decoding.params import SamplingParams
from l4jax.request import Request, RequestMaker, TokenLogprob
from l4jax.serving.engine_client import EngineClient
from l4jax.serving.errors import ApiError
from l4jax.text.load import Text
from l4jax.text.tokenizer import Tokenizer

MOST_CHOICES = 16
"""The largest ``n``."""
MOST_STOPS, MOST_STOP_CHARACTERS = 16, 1024
_SEED_BITS = 53
"""Of a seed that the server draws: clients that read numbers as floating-point ones keep it whole."""


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Sampling settings of requests that leave them out."""

    temperature: float = 1.0
    top_p: float = 1.0


class Sampling(msgspec.Struct, kw_only=True):
    """The sampling parameters that completions and chat completions share."""

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def choices(self) -> int:
        """How many answers to each prompt are asked for."""
        n = 1 if self.n is None else self.n
        if not 1 <= n <= MOST_CHOICES:
            raise ApiError(f"n is {n}; expected 1 to {MOST_CHOICES}", param="n", code="invalid_value")
        return n

    @property
    def streams(self) -> bool:
        """Whether the answer is to be streamed."""
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is given without stream; leave it out, or set stream", param="stream_options")
        return bool(self.stream)


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream says beside its text. ``include_obfuscation`` (padding against listeners) has no effect: there is none."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


@dataclasses.dataclass(frozen=True)
class Served:
    """The served model. ``name``: what clients call it; ``directory``: its checkpoint; ``created``: Unix time of the start."""

    name: str
    config: ModelConfig
    text: Text
    defaults: Defaults
    client: EngineClient
    created: int
    ignore_unknown: bool

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: a model without one is not served."""
        assert self.text.tokenizer is not None
        return self.text.tokenizer

    @property
    def maker(self) -> RequestMaker:
        """Makes checked requests."""
        return RequestMaker(self.config, self.text)

    @property
    def longest(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        ready = self.client.ready
        return self.config.max_position_embeddings if ready is None else ready.longest

    def check_model(self, name: str | None) -> None:
        """Raise ApiError unless the name, if one is given, is the served model's."""
        if name is not None and name != self.name:
            raise ApiError(
                f"the model {name[:100]!r} does not exist; this server has {self.name!r}", status=404, param="model", code="model_not_found"
            )

    def room_after(self, prompt: Sequence[int]) -> int:
        """How many tokens may follow a prompt. Raises ApiError if none may."""
        room = self.longest - len(prompt)
        if room < 1:
            raise ApiError(
                f"the prompt has {len(prompt)} tokens, and prompt and answer together may have {self.longest}; shorten the prompt",
                code="context_length_exceeded",
            )
        return room

    def requests(self, prompt: list[int], body: Sampling, max_tokens: int | None, logprobs: int | None, scope: bytes) -> list[Request]:
        """The requests for all answers to one prompt. ``max_tokens``: None for as many as there is room for.

        Raises ApiError for settings that are out of range.
        """
        room, choices = self.room_after(prompt), body.choices
        if max_tokens is not None and max_tokens > room:
            raise ApiError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens}; expected at most {self.longest} together: shorten "
                "the prompt or lower max_tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if len(stops) > MOST_STOPS or any(len(stop) > MOST_STOP_CHARACTERS for stop in stops):
            raise ApiError(
                f"stop has {len(stops)} strings, the longest of {max(map(len, stops))} characters; expected at most {MOST_STOPS} of up to "
                f"{MOST_STOP_CHARACTERS} characters",
                param="stop",
            )
        seed = secrets.randbits(_SEED_BITS) if body.seed is None else body.seed % 2**64  # clients may send negative ones
        given = {name: getattr(body, name) for name in _BY_NAME if getattr(body, name) is not None}
        try:
            params = SamplingParams(
                max_tokens=room if max_tokens is None else max_tokens,
                stop=stops,
                logit_bias=_biases(body.logit_bias or {}),
                logprobs=logprobs,
                **{"temperature": self.defaults.temperature, "top_p": self.defaults.top_p, **given},
            )
            first = self.maker.request(prompt, dataclasses.replace(params, seed=seed))
        except ValueError as error:
            raise refused(error) from error
        return [dataclasses.replace(first, seed=(seed + choice) % 2**64, scope=scope) for choice in range(choices)]

    def token_text(self, token_id: int) -> str:
        """A token's text, with U+FFFD for what is only part of a character."""
        return self.tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")


_BY_NAME = (
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "temperature"),
    *("top_p", "top_k", "min_p", "stop_token_ids", "ignore_eos"),
)
"""Parameters that have the name and meaning of the engine's."""


def refused(error: ValueError) -> ApiError:
    """The engine's refusal of a request, with the parameter that it names."""
    first = str(error).split(" ", 1)[0]
    named = first in {field.name for field in dataclasses.fields(SamplingParams)}
    return ApiError(str(error), param=first if named else None, code="invalid_value")


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    found = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise ApiError(f"logit_bias has the key {key[:40]!r}; expected a token id", param="logit_bias", code="invalid_value")
        if not abs(bias) <= 100:
            raise ApiError(f"logit_bias has the value {bias}; expected -100 to 100", param="logit_bias", code="invalid_value")
        found[int(key)] = bias
    return found


def scope_of(key: str | None, salt: str | None) -> bytes:
    """The scope in which prefixes are shared: that of an API key, and of a request's own salt."""
    if key is None and salt is None:
        return b""
    return hashlib.blake2b(msgspec.json.encode([key, salt]), digest_size=16).digest()


def chat_logprob(served: Served, token_id: int, logprob: float) -> dict[str, Any]:
    """A token and its log-probability, as chat completions report them."""
    return {"token": served.token_text(token_id), "logprob": logprob, "bytes": list(served.tokenizer.token_bytes(token_id))}


def chat_logprobs(served: Served, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities and alternatives, as chat completions report them."""
    return [
        {**chat_logprob(served, token, each.logprob), "top_logprobs": [chat_logprob(served, *pair) for pair in each.top]}
        for token, each in zip(token_ids, logprobs, strict=True)
    ]


def new_id(prefix: str) -> str:
    """An identifier of an answer."""
    return f"{prefix}-{secrets.token_hex(16)}"

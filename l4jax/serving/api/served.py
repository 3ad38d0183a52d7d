"""What all APIs know of the served model, and how they make its requests."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from l4jax.config import ModelConfig
from l4jax.decoding.guide import Guide
from l4jax.decoding.params import MAX_LOGPROBS, SamplingParams
from l4jax.request import Request, RequestMaker, TokenLogprob
from l4jax.serving.engine_client import EngineClient
from l4jax.serving.errors import ApiError
from l4jax.serving.metrics import Metrics
from l4jax.text.load import Text
from l4jax.text.tokenizer import Tokenizer
from l4jax.text.tool_prompts import ToolPrompt

MAX_N = 16
MAX_REPORTED_TOKENS = 1 << 14
"""Tokens of all answers to a prompt whose log-probabilities are reported."""
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 1024
_SEED_BITS = 53
"""Bits of a seed that the server draws: JavaScript's numbers are doubles, and hold 53 bits exactly."""


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Sampling settings of requests that leave them out."""

    temperature: float = 1.0
    top_p: float = 1.0


class StreamOptions(msgspec.Struct):
    """How a stream looks. ``include_obfuscation``, padding against listeners, has no effect: none is added."""

    include_obfuscation: bool | None = None


class UsageOptions(StreamOptions):
    """What a stream of completions says beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(msgspec.Struct):
    """What an answer must look like: exactly one of these (vLLM's parameter)."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    @property
    def guide(self) -> Guide:
        """As the engine knows it."""
        given = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) not in (None, False)}
        if len(given) != 1:
            names = ", ".join(self.__struct_fields__)
            raise ApiError(
                f"structured_outputs has {len(given)} of {names}; expected one", param="structured_outputs", code="invalid_value"
            )
        ((name, value),) = given.items()
        make: Mapping[str, Callable[[Any], Guide]]
        make = {"json": Guide.json, "regex": Guide.regex, "choice": Guide.choice, "grammar": Guide.grammar}
        return (
            made_guide(Guide.json, None, "structured_outputs")
            if name == "json_object"
            else made_guide(make[name], value, "structured_outputs")
        )


def made_guide(make: Callable[[Any], Guide], value: Any, parameter: str) -> Guide:
    """A guide made of a parameter's value."""
    try:
        return make(value)
    except ValueError as error:
        raise ApiError(f"{parameter}: {error}", param=parameter, code="invalid_value") from error


class Sampling(msgspec.Struct, kw_only=True):
    """The parameters that all of OpenAI's APIs share here, with those that not all of them have there."""

    stop_name: ClassVar[str] = "stop"
    """What the API calls its stop strings."""

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
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
    min_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    structured_outputs: StructuredOutputs | None = None

    def guide_for(self, served: Served) -> tuple[Guide, str] | None:
        """What the answer must look like, and the parameter that says so; None if it is free."""
        return None if self.structured_outputs is None else (self.structured_outputs.guide, "structured_outputs")

    @property
    def answers(self) -> int:
        """How many answers to each prompt are asked for."""
        return 1

    @property
    def streams(self) -> bool:
        """Whether the answer is to be streamed."""
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is given without stream; leave it out, or set stream", param="stream_options")
        return bool(self.stream)


class CompletionSampling(Sampling, kw_only=True):
    """The parameters that completions and chat completions share."""

    max_tokens: int | None = None
    n: int | None = None
    stream_options: UsageOptions | None = None
    return_token_ids: bool | None = None

    @property
    def answers(self) -> int:
        """How many answers to each prompt are asked for."""
        return 1 if self.n is None else _checked("n", self.n, 1, MAX_N)

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_always(self) -> bool:
        """Whether each chunk of a stream has the token counts."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


@dataclasses.dataclass(frozen=True)
class Served:
    """The served model.

    ``name``: what clients call it; ``defaults``: settings of requests that leave them out; ``created``: Unix time of the start;
    ``ignore_unknown``: whether parameters that no route knows are ignored; ``directory``: the checkpoint's path, which clients are not
    told; ``longest_token``: the most characters of a token.
    """

    name: str
    config: ModelConfig
    text: Text
    defaults: Defaults
    client: EngineClient
    metrics: Metrics
    created: int
    ignore_unknown: bool
    directory: str
    longest_token: int

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: a model without one is not served."""
        assert self.text.tokenizer is not None
        return self.text.tokenizer

    @functools.cached_property
    def tool_prompt(self) -> ToolPrompt:
        """How the model's prompts speak of tools; there must be a chat template."""
        assert self.text.chat_format is not None
        return ToolPrompt.of(self.text.chat_format)

    @property
    def maker(self) -> RequestMaker:
        """Makes checked requests."""
        return RequestMaker(self.config, self.text, compiles=False)

    @property
    def max_model_len(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        ready = self.client.ready
        return self.config.max_position_embeddings if ready is None else ready.max_model_len

    def check_model(self, name: str | None) -> None:
        """Raise ApiError unless the name, if one is given, is the served model's."""
        if name is not None and name != self.name:
            raise ApiError(
                f"the model {name[:100]!r} does not exist; this server has {self.name!r}", status=404, param="model", code="model_not_found"
            )

    def room_after(self, prompt: Sequence[int]) -> int:
        """How many tokens may follow a prompt. Raises ApiError if none may."""
        room = self.max_model_len - len(prompt)
        if room < 1:
            raise ApiError(
                f"the prompt has {len(prompt)} tokens, and prompt and answer together may have {self.max_model_len}; shorten the prompt",
                code="context_length_exceeded",
            )
        return room

    def settings(
        self,
        body: Sampling,
        guided: tuple[Guide, str] | None,
        logprobs: int | None,
        max_tokens: int | None,
        limit: str = "max_tokens",
    ) -> SamplingParams:
        """The engine's settings. All of them are checked before the prompt is tokenised, which may take long.

        ``guided``: what the answers must look like, and the parameter that says so, as :meth:`Sampling.guide_for` returns them.
        ``max_tokens``: None for as many as there is room for; ``limit``: the parameter that gave it. Raises ApiError for settings that are
        out of range.
        """
        _ = body.answers, body.streams  # raise for a wrong value
        if max_tokens is not None and max_tokens < 1:
            raise ApiError(f"{limit} is {max_tokens}; expected at least 1", param=limit, code="invalid_value")
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if len(stops) > MAX_STOPS or not all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            raise ApiError(
                f"{body.stop_name} has {len(stops)} strings of {min(map(len, stops))} to {max(map(len, stops))} characters; expected at "
                f"most {MAX_STOPS} of 1 to {MAX_STOP_CHARACTERS} characters",
                param=body.stop_name,
                code="invalid_value",
            )
        given = {name: getattr(body, name) for name in _SAME_IN_ENGINE if getattr(body, name) is not None}
        try:
            return SamplingParams(
                max_tokens=self.max_model_len if max_tokens is None else max_tokens,
                stop=stops,
                logit_bias=_biases(body.logit_bias or {}),
                logprobs=logprobs,
                # Clients may send negative seeds.
                seed=secrets.randbits(_SEED_BITS) if body.seed is None else body.seed % 2**64,
                guide=None if guided is None else guided[0],
                **{"temperature": self.defaults.temperature, "top_p": self.defaults.top_p, **given},
            )
        except ValueError as error:
            raise self.error(error, None if guided is None else guided[1]) from error

    def requests(
        self, prompt: list[int], body: Sampling, params: SamplingParams, key: str | None, *, limit: str | None = "max_tokens"
    ) -> list[Request]:
        """The requests for all answers to one prompt. ``key``: the client's API key; ``limit``: the parameter that limits it, if any.

        Raises ApiError for a prompt that is too long, and for settings that the model cannot have.
        """
        room = self.room_after(prompt)
        if limit is not None and params.max_tokens > room:
            raise ApiError(
                f"the prompt has {len(prompt)} tokens and {limit} is {params.max_tokens}; expected at most {self.max_model_len} together: "
                f"shorten the prompt or lower {limit}",
                param=limit,
                code="context_length_exceeded",
            )
        if params.logprobs is not None:
            most = MAX_REPORTED_TOKENS // body.answers
            if limit is not None and params.max_tokens > most:
                raise ApiError(
                    f"log-probabilities of {body.answers} answers of up to {params.max_tokens} tokens are asked for; expected at most "
                    f"{MAX_REPORTED_TOKENS} tokens in one request; lower {limit}, or leave the log-probabilities out",
                    param=limit,
                    code="invalid_value",
                )
            room = min(room, most)
        try:
            request = self.maker.request(prompt, params.limited_to(room))
        except ValueError as error:
            raise self.error(error) from error
        scope = scope_of(key, body.cache_salt)
        return [dataclasses.replace(request, seed=(request.seed + index) % 2**64, scope=scope) for index in range(body.answers)]

    def check_characters(self, characters: int, param: str) -> None:
        """Raise ApiError for texts that cannot fit in the context, whatever their tokens are: long ones take long to tokenise."""
        most = self.max_model_len * self.longest_token
        if characters > most:
            raise ApiError(
                f"{param} has {characters} characters, and {self.max_model_len} tokens have at most {most}; shorten it",
                param=param,
                code="context_length_exceeded",
            )

    def error(self, error: ValueError, param: str | None = None) -> ApiError:
        """A ValueError as an ApiError, without the path of the checkpoint.

        ``param``: the parameter at fault, unless the error begins with one of ``SamplingParams``.
        """
        text = str(error).replace(f"{self.directory}/", "")
        first = text.split(" ", 1)[0]
        named = first in {field.name for field in dataclasses.fields(SamplingParams)} - {"guide"}
        return ApiError(text, param=first if named else param, code="invalid_value")

    def token_text(self, token_id: int) -> str:
        """A token's text, with U+FFFD for what is only part of a character."""
        return self.tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")


_SAME_IN_ENGINE = (
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "temperature"),
    *("top_p", "top_k", "min_p", "stop_token_ids", "ignore_eos", "min_tokens"),
)
"""Parameters that have the name and meaning of the engine's."""


def checked_logprobs(name: str, top: int) -> int:
    """Return how many alternatives are wanted. Raises ApiError if they are too many."""
    return _checked(name, top, 0, MAX_LOGPROBS)


def _checked(name: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise ApiError(f"{name} is {value}; expected {least} to {most}", param=name, code="invalid_value")
    return value


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    biases = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise ApiError(f"logit_bias has the key {key[:40]!r}; expected a token id", param="logit_bias", code="invalid_value")
        if not abs(bias) <= 100:
            raise ApiError(f"logit_bias of token {key} is {bias}; expected -100 to 100", param="logit_bias", code="invalid_value")
        biases[int(key)] = bias
    return biases


def scope_of(key: str | None, salt: str | None) -> bytes:
    """A digest of API key and salt: only requests that are equal in both share cached prefixes."""
    if key is None and salt is None:
        return b""
    return hashlib.blake2b(msgspec.json.encode([key, salt]), digest_size=16).digest()


def chat_logprobs(served: Served, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities and alternatives, as chat completions report them."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": served.token_text(token_id), "logprob": logprob, "bytes": list(served.tokenizer.token_bytes(token_id))}

    return [
        {**entry(token, each.logprob), "top_logprobs": [entry(*pair) for pair in each.top]}
        for token, each in zip(token_ids, logprobs, strict=True)
    ]


def new_id(prefix: str) -> str:
    """An identifier of an answer or a call."""
    return f"{prefix}{secrets.token_hex(16)}"

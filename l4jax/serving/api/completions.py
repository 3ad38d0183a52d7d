"""``/v1/completions``: OpenAI's completions, with echoed prompts and their log-probabilities for evaluations."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from l4jax.request import TokenLogprob
from l4jax.serving.api.served import Sampling, Served, new_id, refused, scope_of
from l4jax.serving.api.usage import usage_fields
from l4jax.serving.errors import ApiError
from l4jax.serving.generation import Generation, Usage, scores

MOST_PROMPTS = 64
_DEFAULT_TOKENS = 16  # OpenAI's


class CompletionBody(Sampling):
    """The parameters that are honoured."""

    prompt: str | list[Any]
    """A text, token ids, or a list of either."""
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    cache_salt: str | None = None


@dataclasses.dataclass
class _Choice:
    """An answer as it is written: where its next token begins in its text, and whether its prompt is still to be echoed."""

    prompt: list[int]
    echoes: bool
    offset: int = 0


class Completions:
    """One request: checked when it is made, computed by :meth:`whole` or :meth:`stream`."""

    def __init__(self, served: Served, body: CompletionBody, *, key: str | None, request_id: str) -> None:
        served.check_model(body.model)
        self._served, self._body, self._request_id = served, body, request_id
        self.streams = body.streams
        if body.logprobs is not None and not 0 <= body.logprobs <= 20:
            raise ApiError(f"logprobs is {body.logprobs}; expected 0 to 20", param="logprobs", code="invalid_value")
        self._prompts = _prompts(served, body)
        max_tokens = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        self._only_echo = max_tokens == 0
        if self._only_echo and not body.echo:
            raise ApiError("max_tokens is 0 without echo; expected at least 1, or echo", param="max_tokens", code="invalid_value")
        scope = scope_of(key, body.cache_salt)
        if body.max_tokens is None:
            # OpenAI's default is no wish: it gives way where the context ends.
            counts = [min(max_tokens, served.room_after(prompt)) for prompt in self._prompts]
        else:
            counts = [max(1, max_tokens)] * len(self._prompts)
        made = zip(self._prompts, counts, strict=True)
        requests = [one for prompt, count in made for one in served.requests(prompt, body, count, body.logprobs, scope)]
        self._generation = Generation(served.client, served.tokenizer, requests, n=body.choices, request_id=request_id)
        self._choices = [_Choice(list(request.token_ids), bool(body.echo)) for request in requests]
        self._id, self._created = new_id("cmpl"), int(time.time())

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        parts: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        async for found in self._pieces():
            for part in found:
                parts[part["index"]].append(part)
        choices = [self._joined(own) for own in parts]
        return {**self._fields(), "choices": choices, "usage": usage_fields(self._usage)}

    async def stream(self) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer as chunks."""
        options = self._body.stream_options
        include, continuous = (bool(options and options.include_usage), bool(options and options.continuous_usage_stats))
        async for found in self._pieces():
            usage = {"usage": usage_fields(self._usage) if continuous else None} if include or continuous else {}
            yield [{**self._fields(), "choices": [choice], **usage} for choice in found]
        if include:
            yield [{**self._fields(), "choices": [], "usage": usage_fields(self._usage)}]

    def close(self) -> None:
        """End what is still computed for it."""
        self._generation.close()

    @property
    def _usage(self) -> Usage:
        if self._only_echo:
            return Usage(sum(map(len, self._prompts)), 0, 0)
        return self._generation.usage

    async def _pieces(self) -> AsyncIterator[list[dict[str, Any]]]:
        """What comes for the choices, as the APIs' objects."""
        prompt_scores: list[list[TokenLogprob]] | None = None
        if self._body.echo and self._body.logprobs is not None:
            prompt_scores = await scores(self._served.client, self._prompts, self._body.logprobs, self._request_id)
        if self._body.echo:
            yield [self._echo(index, prompt_scores) for index in range(len(self._choices))]
        if self._only_echo:
            return
        async for pieces in self._generation.pieces():
            yield [
                self._part(piece.choice, piece.text, piece.token_ids, piece.logprobs, piece.finish_reason)
                for piece in pieces
                if piece.text or piece.token_ids or piece.finish_reason
            ]

    def _echo(self, index: int, prompt_scores: list[list[TokenLogprob]] | None) -> dict[str, Any]:
        prompt = self._choices[index].prompt
        own = None if prompt_scores is None else [None, *prompt_scores[index // self._body.choices]]
        return self._part(index, self._served.tokenizer.decode(prompt), prompt, own, "length" if self._only_echo else None)

    def _part(
        self, index: int, text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        choice = self._choices[index]
        part: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        if logprobs is not None:
            part["logprobs"] = self._logprobs(choice, token_ids, logprobs)
        if self._body.return_token_ids:
            part["token_ids"] = list(token_ids)
            part["prompt_token_ids"] = choice.prompt
        part["seed"] = self._generation.requests[index].seed
        return part

    def _logprobs(self, choice: _Choice, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> dict[str, list[Any]]:
        """Tokens, log-probabilities, alternatives, and where each token begins in the text. A prompt's first token has none: None."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, each in zip(token_ids, logprobs, strict=True):
            text = self._served.token_text(token)
            found["tokens"].append(text)
            found["text_offset"].append(choice.offset)
            found["token_logprobs"].append(None if each is None else each.logprob)
            alternatives = None if each is None else {self._served.token_text(other): value for other, value in reversed(each.top)}
            found["top_logprobs"].append(None if alternatives is None else {text: each.logprob, **alternatives} if each else None)
            choice.offset += len(text)
        return found

    def _joined(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A choice's parts as one."""
        whole = {**parts[-1], "text": "".join(part["text"] for part in parts)}
        if parts[-1]["logprobs"] is not None:
            whole["logprobs"] = {name: [x for part in parts for x in part["logprobs"][name]] for name in parts[-1]["logprobs"]}
        if self._body.return_token_ids:
            whole["token_ids"] = [token for part in parts for token in part["token_ids"]]
        return whole

    def _fields(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._served.name}


def _prompts(served: Served, body: CompletionBody) -> list[list[int]]:
    """The prompts' tokens. Raises ApiError for a prompt that is empty, or has tokens that the model does not."""
    given = body.prompt
    several: Sequence[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not 1 <= len(several) <= MOST_PROMPTS or len(several) * body.choices > MOST_PROMPTS:
        raise ApiError(
            f"prompt has {len(several)} prompts with {body.choices} answers each; expected 1 to {MOST_PROMPTS} answers in all",
            param="prompt",
        )
    try:
        return [served.maker.encode(prompt) for prompt in several]
    except ValueError as error:
        found = refused(error)
        found.param = "prompt"
        raise found from error

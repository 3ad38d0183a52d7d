"""``/v1/completions``: OpenAI's completions, with echoed prompts and their log-probabilities for evaluations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from l4jax.request import TokenLogprob
from l4jax.serving.api.served import CompletionSampling, Served, checked_logprobs, new_id
from l4jax.serving.api.usage import usage_fields
from l4jax.serving.errors import ApiError
from l4jax.serving.generation import Generation, Usage, scores

MAX_ANSWERS = 64
"""Prompts times ``n``."""
MAX_SCORED_TOKENS = 1 << 16
"""Of all prompts of a request whose log-probabilities are asked for."""
_DEFAULT_TOKENS = 16  # OpenAI's


class CompletionBody(CompletionSampling):
    """The parameters that are honoured. ``prompt``: a text, token ids, or a list of either."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None


class Completions:
    """A request: checked when it is made, computed by :meth:`whole` or :meth:`stream`."""

    def __init__(self, served: Served, body: CompletionBody, *, key: str | None, request_id: str) -> None:
        served.check_model(body.model)
        self._served, self._body, self._request_id = served, body, request_id
        self.streams = body.streams
        logprobs = None if body.logprobs is None else checked_logprobs("logprobs", body.logprobs)
        self._only_echo = bool(body.echo) and body.max_tokens == 0
        max_tokens = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        self.guided = body.guide_for(served)
        params = served.settings(body, self.guided, logprobs, 1 if self._only_echo else max_tokens)
        self._prompts = _prompts(served, body)
        if body.echo and logprobs is not None and (total := sum(map(len, self._prompts)) * body.answers) > MAX_SCORED_TOKENS:
            raise ApiError(
                f"the log-probabilities of {total} prompt tokens are asked for; expected at most {MAX_SCORED_TOKENS} in one request; send "
                "fewer or shorter prompts",
                param="prompt",
            )
        # OpenAI's default was not asked for, so it is cut to what fits in the context.
        limit = None if body.max_tokens is None else "max_tokens"
        requests = [one for prompt in self._prompts for one in served.requests(prompt, body, params, key, limit=limit)]
        self.answers = len(requests)
        self.generation = Generation(served.client, served.metrics, served.tokenizer, requests, n=body.answers, request_id=request_id)
        self._offsets = [0] * len(requests)  # where each answer's next token begins in its text
        self._begun: set[int] = set()
        self._id, self._created = new_id("cmpl-"), int(time.time())

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        parts: list[list[dict[str, Any]]] = [[] for _ in self._offsets]
        async for choices in self._choices():
            for choice in choices:
                parts[choice["index"]].append(choice)
        return {**self._fields(), "choices": [self._joined(own) for own in parts], "usage": usage_fields(self._usage)}

    async def stream(self) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer as chunks."""
        at_end, always = self._body.usage_at_end, self._body.usage_always
        async for choices in self._choices():
            usage = {"usage": usage_fields(self._usage) if always else None} if at_end or always else {}
            yield [{**self._fields(), "choices": [choice], **usage} for choice in choices]
        if at_end:
            yield [{**self._fields(), "choices": [], "usage": usage_fields(self._usage)}]

    @property
    def _usage(self) -> Usage:
        if self._only_echo:
            return Usage(sum(map(len, self._prompts)), 0, 0)
        return self.generation.usage

    async def _choices(self) -> AsyncIterator[list[dict[str, Any]]]:
        """What comes for the answers, as OpenAI's choice objects."""
        prompt_scores: list[list[TokenLogprob]] | None = None
        if self._body.echo and self._body.logprobs is not None:
            prompt_scores = await scores(self._served.client, self._served.metrics, self._prompts, self._body.logprobs, self._request_id)
        if self._body.echo:
            for index in range(len(self._offsets)):
                # In a thread: a long prompt's log-probabilities take long to list, and other streams go on.
                yield [await asyncio.to_thread(self._echo, index, prompt_scores)]
        if self._only_echo:
            return
        async for pieces in self.generation.pieces():
            choices = [
                self._choice(piece.index, piece.text, piece.token_ids, piece.logprobs, piece.finish_reason)
                for piece in pieces
                if piece.text or piece.logprobs or piece.finish_reason or self._body.return_token_ids
            ]
            if choices:
                yield choices

    def _echo(self, index: int, prompt_scores: list[list[TokenLogprob]] | None) -> dict[str, Any]:
        prompt = self._prompts[index // self._body.answers]
        # A prompt's first token has no log-probability.
        own = None if prompt_scores is None else [None, *prompt_scores[index // self._body.answers]]
        text = self._served.tokenizer.decode(prompt)
        return self._choice(index, text, prompt, own, "length" if self._only_echo else None, echoed=True)

    def _choice(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob | None] | None,
        finish_reason: str | None,
        *,
        echoed: bool = False,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        if logprobs is not None:
            choice["logprobs"] = self._logprobs(index, token_ids, logprobs)
        if self._body.return_token_ids:
            choice["token_ids"] = [] if echoed else list(token_ids)
            if index not in self._begun:
                choice["prompt_token_ids"] = self._prompts[index // self._body.answers]
        self._begun.add(index)
        choice["seed"] = self.generation.requests[index].seed
        return choice

    def _logprobs(self, index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> dict[str, list[Any]]:
        """Tokens, their log-probabilities and alternatives, and where each token begins in the text."""
        listed: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, each in zip(token_ids, logprobs, strict=True):
            text, top = self._served.token_text(token), None
            if each is not None:
                # Reversed: of two tokens with the same text the likelier one counts.
                top = {self._served.token_text(other): value for other, value in reversed(each.top)} | {text: each.logprob}
            listed["tokens"].append(text)
            listed["text_offset"].append(self._offsets[index])
            listed["token_logprobs"].append(None if each is None else each.logprob)
            listed["top_logprobs"].append(top)
            self._offsets[index] += len(text)
        return listed

    def _joined(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The parts of one choice, joined."""
        whole = {**parts[-1], "text": "".join(part["text"] for part in parts)}
        listed = [part["logprobs"] for part in parts if part["logprobs"] is not None]
        if listed:
            whole["logprobs"] = {name: [entry for logprobs in listed for entry in logprobs[name]] for name in listed[0]}
        if self._body.return_token_ids:
            whole["token_ids"] = [token for part in parts for token in part["token_ids"]]
            whole["prompt_token_ids"] = parts[0]["prompt_token_ids"]
        return whole

    def _fields(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._served.name}


def _prompts(served: Served, body: CompletionBody) -> list[list[int]]:
    """The prompts' tokens. Raises ApiError for a prompt that is empty, or has token ids outside the vocabulary."""
    given = body.prompt
    is_one = isinstance(given, str) or (len(given) > 0 and not isinstance(given[0], str | list))
    several: Sequence[Any] = [given] if is_one else given
    if not 1 <= len(several) <= MAX_ANSWERS or len(several) * body.answers > MAX_ANSWERS:
        raise ApiError(
            f"{len(several)} prompts with {body.answers} answers each are asked for; expected 1 to {MAX_ANSWERS} answers in all; send "
            "fewer prompts in one request",
            param="prompt",
            code="invalid_value",
        )
    for prompt in several:
        if isinstance(prompt, str):
            served.check_characters(len(prompt), "prompt")
    try:
        return [served.maker.encode(prompt) for prompt in several]
    except ValueError as error:
        raise served.error(error, "prompt") from error

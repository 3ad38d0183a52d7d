"""``/v1/chat/completions``: OpenAI's chat completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from l4jax.serving.api.served import Sampling, Served, chat_logprobs, new_id, refused, scope_of
from l4jax.serving.api.usage import usage_fields
from l4jax.serving.errors import ApiError
from l4jax.serving.generation import Generation, Piece
from l4jax.text.chat import ChatOptions

MOST_MESSAGES = 2048
PREFIX = "chatcmpl"


class ChatBody(Sampling):
    """The parameters that are honoured."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    cache_salt: str | None = None

    @property
    def logprobs_wanted(self) -> int | None:
        """How many alternatives are reported beside each token's log-probability; None if nothing is."""
        top = self.top_logprobs
        if top is not None and not self.logprobs:
            raise ApiError("top_logprobs is given without logprobs; leave it out, or set logprobs", param="top_logprobs")
        if top is not None and not 0 <= top <= 20:
            raise ApiError(f"top_logprobs is {top}; expected 0 to 20", param="top_logprobs", code="invalid_value")
        return (top or 0) if self.logprobs else None


class Chat:
    """One request: checked when it is made, computed by :meth:`whole` or :meth:`stream`."""

    def __init__(self, served: Served, body: ChatBody, *, key: str | None, request_id: str) -> None:
        served.check_model(body.model)
        self._served, self._body = served, body
        self.streams = body.streams
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        prompt = prompt_of(served, body)
        requests = served.requests(prompt, body, max_tokens, body.logprobs_wanted, scope_of(key, body.cache_salt))
        self._generation = Generation(served.client, served.tokenizer, requests, n=len(requests), request_id=request_id)
        self._id, self._created = new_id(PREFIX), int(time.time())

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        texts: list[list[str]] = [[] for _ in self._generation.requests]
        choices = [self._choice(index) for index in range(len(texts))]
        async for pieces in self._generation.pieces():
            for piece in pieces:
                choice = choices[piece.choice]
                texts[piece.choice].append(piece.text)
                if piece.logprobs is not None:
                    choice["logprobs"]["content"] += chat_logprobs(self._served, piece.token_ids, piece.logprobs)
                if self._body.return_token_ids:
                    choice["token_ids"] += piece.token_ids
                choice["finish_reason"] = piece.finish_reason
        for choice, parts in zip(choices, texts, strict=True):
            choice["message"] = {"role": "assistant", "content": "".join(parts), "refusal": None}
        answer = {**self._fields("chat.completion"), "choices": choices, "usage": usage_fields(self._generation.usage)}
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = self._generation.requests[0].token_ids
        return answer

    async def stream(self) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer as chunks."""
        options = self._body.stream_options
        include, continuous = (bool(options and options.include_usage), bool(options and options.continuous_usage_stats))
        begun: set[int] = set()

        def chunk(choices: Sequence[dict[str, Any]], *, last: bool = False) -> dict[str, Any]:
            fields = {**self._fields("chat.completion.chunk"), "choices": choices}
            if include or continuous:
                fields["usage"] = usage_fields(self._generation.usage) if last or continuous else None
            return fields

        async for pieces in self._generation.pieces():
            chunks = []
            for piece in pieces:
                if piece.choice not in begun:
                    begun.add(piece.choice)
                    first = chunk([self._first(piece.choice)])
                    if self._body.return_token_ids:
                        first["prompt_token_ids"] = self._generation.requests[piece.choice].token_ids
                    chunks.append(first)
                chunks += [chunk([choice]) for choice in self._deltas(piece)]
            yield chunks
        if include:
            yield [chunk([], last=True)]

    def close(self) -> None:
        """End what is still computed for it."""
        self._generation.close()

    def _fields(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._served.name}

    def _choice(self, index: int) -> dict[str, Any]:
        asked = self._body.logprobs
        ids: dict[str, list[int]] = {"token_ids": []} if self._body.return_token_ids else {}
        seed = self._generation.requests[index].seed
        return {"index": index, "logprobs": {"content": [], "refusal": None} if asked else None, "seed": seed, **ids}

    def _first(self, index: int) -> dict[str, Any]:
        seed = self._generation.requests[index].seed
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None, "seed": seed}

    def _deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks' choices for a piece: its text, if it has any to show, and the end."""
        found: list[dict[str, Any]] = []
        if piece.text or piece.logprobs or (self._body.return_token_ids and piece.token_ids):
            content = None if piece.logprobs is None else chat_logprobs(self._served, piece.token_ids, piece.logprobs)
            choice: dict[str, Any] = {
                "index": piece.choice,
                "delta": {"content": piece.text},
                "logprobs": content and {"content": content, "refusal": None},
            }
            choice["finish_reason"] = None
            if self._body.return_token_ids:
                choice["token_ids"] = piece.token_ids
            found.append(choice)
        if piece.finish_reason is not None:
            found.append({"index": piece.choice, "delta": {}, "logprobs": None, "finish_reason": piece.finish_reason})
        return found


def prompt_of(served: Served, body: ChatBody) -> list[int]:
    """The prompt's tokens. Raises ApiError for a conversation that the chat template cannot format."""
    if len(body.messages) > MOST_MESSAGES:
        raise ApiError(f"messages has {len(body.messages)} messages; expected at most {MOST_MESSAGES}", param="messages")
    if body.add_generation_prompt is not None and body.add_generation_prompt == bool(body.continue_final_message):
        raise ApiError(
            "add_generation_prompt and continue_final_message contradict each other; leave one of them out", param="add_generation_prompt"
        )
    options: ChatOptions = {
        "chat_template_kwargs": body.chat_template_kwargs,
        "continue_final_message": bool(body.continue_final_message),
    }
    try:
        return served.maker.encode_chat(body.messages, options)
    except ValueError as error:
        found = refused(error)
        found.param = found.param or "messages"
        raise found from error

"""Runs what one HTTP request asks for: one or several answers, as pieces of text and tokens."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from l4jax.answer import Answer, NewTokens
from l4jax.request import FinishReason, Request, TokenLogprob
from l4jax.serving import errors
from l4jax.serving.engine_client import EngineClient, Inbox
from l4jax.serving.errors import ApiError
from l4jax.serving.messages import ErrorKind, News
from l4jax.serving.metrics import AnswerMetrics, Metrics, Reason
from l4jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """What came for one answer: ``index`` counts the answers from 0.

    ``finish_reason`` is set in an answer's last piece only, and ``stopped_by`` if a stop string has ended it.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob] | None
    finish_reason: FinishReason | None
    stopped_by: str | None = None


@dataclasses.dataclass(frozen=True)
class Usage:
    """Token counts. Each prompt is counted once; ``cached``: tokens of prompts that the prefix cache had."""

    prompt: int
    cached: int
    output: int


class Generation:
    """The answers to one HTTP request."""

    def __init__(
        self, client: EngineClient, metrics: Metrics, tokenizer: Tokenizer, requests: Sequence[Request], *, n: int, request_id: str
    ) -> None:
        """``requests``: one for each answer; the first ``n`` are those to the first prompt."""
        self.requests = requests
        self._client = client
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._n = n
        self._request_id = request_id
        self._answers = [Answer(tokenizer, request) for request in requests]
        self._cached = [0] * len(requests)
        self._answer_metrics: list[AnswerMetrics] = []
        self._ends: list[Reason | ErrorKind | None] = [None] * len(requests)
        self._index_of: dict[int, int] = {}  # of each answer that has not ended, by the engine's number of it

    @property
    def usage(self) -> Usage:
        """The counts so far."""
        first_of_each_prompt = range(0, len(self.requests), self._n)
        return Usage(
            prompt=sum(len(self.requests[index].token_ids) for index in first_of_each_prompt),
            cached=sum(self._cached[index] for index in first_of_each_prompt),
            output=sum(len(answer.token_ids) for answer in self._answers),
        )

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Begin all answers, and return what comes for them; :meth:`close` ends them. Raises :class:`ApiError` if one fails."""
        began, inbox = time.perf_counter(), Inbox()
        self._metrics.request_answers.observe(self._n)
        self._answer_metrics = [AnswerMetrics(self._metrics, request) for request in self.requests]
        self._index_of = {self._client.add(request, inbox): index for index, request in enumerate(self.requests)}
        try:
            while self._index_of:
                pieces: list[Piece] = []
                error = None
                for news in await inbox.take():
                    try:
                        piece = self._take(news, time.perf_counter() - began)
                    except ApiError as raised:
                        error = error or raised
                        continue
                    if piece is not None:
                        pieces.append(piece)
                if pieces:
                    yield pieces  # what came before the error too
                if error is not None:
                    raise error
        finally:
            self.close()

    def summary(self, *, texts: bool) -> dict[str, Any]:
        """What the log says of the answers: counts of tokens, seeds, and how each answer ended; with ``texts`` what was written."""
        usage, answers = self.usage, self._answers
        found: dict[str, Any] = {
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "output_tokens": usage.output,
            "seeds": [request.seed for request in self.requests],
            "ends": self._ends,
        }
        if texts:
            found["prompts"] = [self._tokenizer.decode(request.token_ids) for request in self.requests[:: self._n]]
            found["answers"] = [answer.text for answer in answers]
        return found

    def close(self) -> None:
        """Cancel the answers that have not ended."""
        for number, index in self._index_of.items():
            self._client.cancel(number)
            self._answer_metrics[index].ended("abort")
            self._ends[index] = "abort"
        self._index_of.clear()

    def _take(self, news: News, elapsed: float) -> Piece | None:
        index = self._index_of.get(news.number)
        if index is None:
            return None  # a stop string has ended it
        if news.error is not None:
            del self._index_of[news.number]
            self._ends[index] = kind = news.error_kind or "failed"
            self._metrics.failed(kind)
            raise error_of(news, self._request_id)
        answer = self._answers[index]
        self._answer_metrics[index].came(news)
        before = len(answer.token_ids)
        self._cached[index] = max(self._cached[index], news.cached)
        text = answer.extend(NewTokens(news.token_ids, news.logprobs), news.over, elapsed)
        over = news.over or answer.stopped
        if over:
            del self._index_of[news.number]
            self._client.cancel(news.number)
        new = answer.token_ids[before:]
        logprobs = None if news.logprobs is None else news.logprobs[: len(new)]
        finish_reason = answer.completion().finish_reason if over else None
        if finish_reason is not None:
            self._answer_metrics[index].ended(finish_reason)
            self._ends[index] = finish_reason
        return Piece(index, text, new, logprobs, finish_reason, answer.stopped_by)


async def scores(
    client: EngineClient, metrics: Metrics, prompts: Sequence[list[int]], top: int, request_id: str
) -> list[list[TokenLogprob]]:
    """The log-probabilities of each prompt's tokens after the first. Raises :class:`ApiError` if they cannot be computed."""
    inbox = Inbox()
    numbers = [client.score(prompt, top, inbox) for prompt in prompts]
    found: dict[int, list[TokenLogprob]] = {}
    try:
        while len(found) < len(numbers):
            for news in await inbox.take():
                if news.error is not None:
                    metrics.failed(news.error_kind or "failed")
                    raise error_of(news, request_id)
                if news.over:
                    found[news.number] = news.logprobs or []
    finally:
        for number in numbers:
            client.cancel(number)
    return [found[number] for number in numbers]


def error_of(news: News, request_id: str) -> ApiError:
    """The error that ends a request."""
    assert news.error is not None
    if news.error_kind in ("bad_request", "guide"):
        return ApiError(news.error)
    if news.error_kind == "not_finite":
        return errors.not_finite(request_id)
    if news.error_kind == "closing":
        return errors.not_ready(news.error)
    return errors.failed(news.error)

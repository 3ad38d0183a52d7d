"""Requests under way: what the engine hands what it has computed to, and what callers see of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from l4jax.answer import NO_ROUNDS, Answer, NewTokens
from l4jax.engine.results import RowOutput
from l4jax.engine.sequence import Sequence
from l4jax.request import Completion, Request
from l4jax.text.tokenizer import Tokenizer


class Handle:
    """A request under way. It goes on whenever anyone drives the engine.

    ``tokens``: the answer's so far. ``over``: the request has ended. ``completion``: the answer, once it is complete. ``error``: why it
    ended without a completion.
    """

    _cancelled = "this request was cancelled"
    """The error of one that is."""

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer | None, cancel: Callable[[int], None]) -> None:
        self.request = request
        self.completion: Completion | None = None
        self.error: Exception | None = None
        self.over = False
        self._number = number
        self._cancel = cancel
        self._answer = Answer(tokenizer, request)
        self._added = time.perf_counter()
        self._queue_seconds = 0.0  # until its first piece was dispatched
        self._sequence = self._new_sequence()
        self._matcher = None if request.guide is None else request.guide.start()

    @property
    def tokens(self) -> list[int]:
        """The answer's tokens so far."""
        return list(self._answer.token_ids)

    def cancel(self) -> None:
        """End the request, unless it has ended. May be called from any thread; the engine's next iteration ends it.

        On several hosts only process 0's call counts, and ends the request everywhere.
        """
        if not self.over:
            self._cancel(self._number)

    @staticmethod
    def _most_new(request: Request) -> int:
        """The most tokens that are added to the prompt."""
        return request.params.max_tokens

    def _new_sequence(self) -> Sequence:
        prompt = list(self.request.token_ids)
        guided = self.request.guide is not None
        return Sequence(self._number, prompt, len(prompt) + self._most_new(self.request), scope=self.request.scope, guided=guided)

    def _begin(self) -> None:
        """The first piece of its prompt has been dispatched, perhaps again."""
        if self._queue_seconds == 0.0:
            self._queue_seconds = time.perf_counter() - self._added

    def _restart(self) -> None:
        """Its prompt is computed from the start, perhaps again."""

    def _take(self, tokens: tuple[int, ...], output: RowOutput) -> bool:
        """Take in what a step has given it; returns whether it wants no more."""
        answer = self._answer
        if tokens:
            if output.rounds is not NO_ROUNDS:
                answer.rounds = answer.rounds.and_then(output.rounds)
            new, done = NewTokens(list(tokens), output.logprobs), self._sequence.state.is_over
            self._show(answer.extend(new, done, time.perf_counter() - self._added))
        return answer.stopped

    def _show(self, text: str) -> None:
        """Let the caller have more of the text."""

    def _complete(self) -> None:
        """It has all that it asked for."""
        self.completion = self._answer.completion()


class TextHandle(Handle):
    """A request whose text is read as it comes, by a stream. Nobody else can cancel it."""

    _cancelled = "this stream was closed, and nothing more is computed for it; ask for another one"

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer | None, cancel: Callable[[int], None]) -> None:
        super().__init__(number, request, tokenizer, cancel)
        self._text: deque[str] = deque()

    def new_text(self) -> str:
        """The text that came since the last call."""
        return "".join(self._text.popleft() for _ in range(len(self._text)))

    def put_back(self, text: str) -> None:
        """Let the next call return this text again."""
        if text:
            self._text.appendleft(text)

    def _show(self, text: str) -> None:
        self._text.append(text)

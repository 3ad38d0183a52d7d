"""Requests of another process, which turns their tokens into text."""

from __future__ import annotations

from collections.abc import Callable

from l4jax.engine.handle import Handle
from l4jax.engine.results import RowOutput
from l4jax.request import Request, TokenLogprob
from l4jax.text.tokenizer import Tokenizer


class RelayHandle(Handle):
    """A request of another process. Its tokens are passed on as they come and are not kept; stop strings are left to that process."""

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer | None, cancel: Callable[[int], None]) -> None:
        super().__init__(number, request, None, cancel)
        self._new: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None
        self._cached: int | None = None

    @property
    def queue_seconds(self) -> float:
        """How long it waited until its first tokens were sent to the devices; 0 before."""
        return self._queue_seconds

    def news(self) -> tuple[list[int], list[TokenLogprob] | None, int]:
        """What came since the last call: tokens, and their log-probabilities if the request asked for them.

        The number: how many of the prompt's tokens the prefix cache had when the answer's first token came.
        """
        news = self._new, self._logprobs, self._cached or 0
        self._new, self._logprobs = [], None
        return news

    def _take(self, tokens: tuple[int, ...], output: RowOutput) -> bool:
        if tokens and self._cached is None:
            self._cached = self._sequence.hit
        self._new += tokens
        if output.logprobs is not None:
            self._logprobs = [*(self._logprobs or ()), *output.logprobs]
        return False

    def _complete(self) -> None:
        pass

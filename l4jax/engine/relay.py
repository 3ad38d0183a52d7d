"""Requests whose answers another process makes text of."""

from __future__ import annotations

from collections.abc import Callable

from l4jax.engine.handle import Handle
from l4jax.engine.results import RowOutput
from l4jax.request import Request, TokenLogprob
from l4jax.text.tokenizer import Tokenizer


class RelayHandle(Handle):
    """A request of another process: what it gets is handed on as it comes, and nothing is kept. Stop strings are that process's work.

    ``cached``: tokens of the prompt that were in the prefix cache when its first token came.
    """

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer | None, cancel: Callable[[int], None]) -> None:
        super().__init__(number, request, None, cancel)
        self.cached: int | None = None
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def new_tokens(self) -> tuple[list[int], list[TokenLogprob]]:
        """The tokens that came since the last call, and their log-probabilities, if the request asked for them."""
        new = self._tokens, self._logprobs
        self._tokens, self._logprobs = [], []
        return new

    def _take(self, tokens: tuple[int, ...], output: RowOutput) -> bool:
        if self.cached is None:
            self.cached = self._sequence.hit
        self._tokens += tokens
        self._logprobs += output.logprobs or ()
        return False

    def _complete(self) -> None:
        pass

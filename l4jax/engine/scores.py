"""Prompts under way that are scored, and what callers get of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from l4jax.engine.handle import Handle
from l4jax.engine.results import RowOutput
from l4jax.engine.sequence import Sequence
from l4jax.request import Request, TokenLogprob


class ScoresHandle(Handle):
    """A prompt that is scored: it has log-probabilities, if its request asks for them, or logits; both are whole once it is over."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.logprobs: list[TokenLogprob] = []
        self._logits: list[np.ndarray] = []

    @property
    def logits(self) -> np.ndarray:
        """Float32 [T, vocabulary]."""
        self._logits = [np.concatenate(self._logits)]  # the pieces are dropped: together they are as large
        return self._logits[0]

    @staticmethod
    def _most_new(request: Request) -> int:
        return 1

    def _new_sequence(self) -> Sequence:
        prompt = list(self.request.token_ids)
        return Sequence(self._number, prompt, len(prompt) + 1, scope=None, scores=True)

    def _restart(self) -> None:
        self.logprobs.clear()
        self._logits.clear()

    def _take(self, tokens: tuple[int, ...], output: RowOutput) -> bool:
        self.logprobs += output.logprobs or ()
        self._logits += [] if output.logits_TV is None else [output.logits_TV]
        return False

    def _complete(self) -> None:
        pass

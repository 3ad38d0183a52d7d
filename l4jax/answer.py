"""An answer as it grows, from tokens to a completion. Imports no JAX."""

from __future__ import annotations

import dataclasses
import itertools

from l4jax.request import Completion, Request, Stats, TokenLogprob
from l4jax.text.output import OutputText
from l4jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """What one step added to an answer; ``logprobs`` is None unless the request asked for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Counts of a row's speculation: rounds, drafted tokens, and how many rounds accepted the draft at each depth."""

    rounds: int
    drafted: int
    accepted: tuple[int, ...]

    def and_then(self, more: Rounds) -> Rounds:
        """The sums of these counts and ``more``, which may be of a tree of another depth."""
        accepted = tuple(map(sum, itertools.zip_longest(self.accepted, more.accepted, fillvalue=0)))
        return Rounds(self.rounds + more.rounds, self.drafted + more.drafted, accepted)


NO_ROUNDS = Rounds(0, 0, ())
"""Without speculation."""


class Answer:
    """One request's answer so far: ``token_ids``, and ``rounds`` of speculation, which the caller adds up."""

    def __init__(self, tokenizer: Tokenizer | None, request: Request) -> None:
        self._request = request
        self._text = OutputText(tokenizer, request.params.stop, request.stop_ids, request.params.min_tokens)
        self.token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._progress: list[tuple[int, float]] = []
        self._ended = False
        self.rounds = NO_ROUNDS

    @property
    def text(self) -> str | None:
        """The text so far; None without a tokenizer."""
        return self._text.text

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared; what comes after it is dropped."""
        return self._text.stopped

    @property
    def stopped_by(self) -> str | None:
        """The stop string that has appeared."""
        return self._text.stopped_by

    def extend(self, new: NewTokens, done: bool, elapsed: float) -> str:
        """Add new tokens, and return the text that may be shown now. ``done``: these are the last; ``elapsed``: seconds since the start."""
        if self._ended:
            return ""
        kept, text = self._text.extend(new.token_ids, done=done)
        self.token_ids += new.token_ids[:kept]
        if new.logprobs is not None:
            self._logprobs += new.logprobs[:kept]
        self._progress.append((len(self.token_ids), elapsed))
        self._ended = done or self.stopped
        return text

    def completion(self) -> Completion:
        """The completion, after at least one :meth:`extend`."""
        (_, first_seconds), (last, last_seconds) = self._progress[0], self._progress[-1]
        begun, begun_seconds = self._progress[1 if len(self._progress) > 2 else 0]
        ended_by_token = bool(self.token_ids) and self.token_ids[-1] in self._request.stop_ids
        return Completion(
            prompt_token_ids=list(self._request.token_ids),
            token_ids=self.token_ids,
            text=self.text,
            finish_reason="stop" if self.stopped or ended_by_token else "length",
            logprobs=None if self._request.params.logprobs is None else self._logprobs,
            seed=self._request.seed,
            stats=Stats(
                prompt_tokens=len(self._request.token_ids),
                output_tokens=len(self.token_ids),
                first_token_seconds=first_seconds,
                decode_seconds=last_seconds - first_seconds,
                decode_tokens_per_second=(last - begun) / (last_seconds - begun_seconds) if last > begun else 0.0,
                rounds=self.rounds.rounds,
                drafted=self.rounds.drafted,
                accepted=self.rounds.accepted,
            ),
        )

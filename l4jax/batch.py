"""A batch of requests: prefilled together, then decoded together burst by burst, on a runner's cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax

from l4jax.answer import NO_ROUNDS, NewTokens, Rounds
from l4jax.decoding.generate import BURST, DecodeTokens
from l4jax.decoding.plan import Speculation
from l4jax.decoding.sampling import Logprobs
from l4jax.request import Request, TokenLogprob
from l4jax.runner import Runner


class Batch:
    """Requests that are decoded together, from their first token to the last one's end.

    It holds the runner's cache until another batch is made or logits are asked for.
    """

    def __init__(self, runner: Runner, requests: Sequence[Request], *, plan: Speculation | Literal["auto"] | None = "auto") -> None:
        """``plan``: how to speculate, if at all; "auto": as the runner does for such requests."""
        self._runner = runner
        self._requests = requests
        runner.reserve(len(requests), max(len(r.token_ids) + r.params.max_tokens for r in requests))
        self._claim = runner.claim_cache()
        runner.admit(
            range(len(requests)), len(requests), [r.params for r in requests], [r.seed for r in requests], [r.stop_ids for r in requests]
        )
        prompts = [r.token_ids for r in requests]
        self._plan = runner.speculation(len(prompts), max(map(len, prompts))) if plan == "auto" else plan
        self._lengths = list(map(len, prompts))
        first, logprobs, self.done = runner.prefill(prompts, drafting=self._plan is not None)
        self.rounds = [Rounds(0, 0, (0,) * self._plan.tree.depth) if self._plan else NO_ROUNDS] * len(requests)
        self._first: list[NewTokens] | None = [
            NewTokens([int(token)], self._logprobs(row, [of_row])) for row, (token, of_row) in enumerate(zip(first, logprobs, strict=True))
        ]

    def finish(self, row: int) -> None:
        """End a row from outside (a stop string was found)."""
        self._runner.check_claim(self._claim)
        self.done[row] = True
        self._runner.free(row, len(self._requests))

    def step(self, steps: int) -> list[NewTokens]:
        """The next tokens of each row: the first call gives the prefill's, each later one up to ``steps``."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        self._runner.check_claim(self._claim)
        tokens = self._advance(steps)
        wanted = tokens.logprobs if any(r.params.logprobs is not None for r in self._requests) else None
        token_sB, logprobs, taken, done_B = jax.device_get((tokens.token_sB, wanted, tokens.steps, tokens.done_B))
        self._runner.check_tokens(token_sB[:taken])
        self.done = [bool(done_B[row]) for row in range(len(self._requests))]
        result = []
        for row in range(len(self._requests)):
            count = int((token_sB[:taken, row] >= 0).sum())
            at_step = [None if logprobs is None else jax.tree.map(lambda leaf, s=s, row=row: leaf[s, row], logprobs) for s in range(count)]
            self._lengths[row] += count
            result.append(NewTokens(token_sB[:count, row].tolist(), self._logprobs(row, at_step)))
        return result

    def _advance(self, steps: int) -> DecodeTokens:
        unfinished = [length for length, done in zip(self._lengths, self.done, strict=True) if not done]
        if min(unfinished, default=0) > self._runner.drafts_up_to:
            self._plan = None  # no round would draft anything any more
        if self._plan is None:
            return self._runner.decode(len(self._requests), steps)
        tokens, counted = self._runner.speculate(len(self._requests), steps, self._plan)
        counted = jax.device_get(counted)
        self.rounds = [
            Rounds(
                rounds.rounds + int(counted.rounds_B[row]),
                rounds.drafted + int(counted.drafted_B[row]),
                tuple(before + int(now) for before, now in zip(rounds.accepted, counted.accepted_Bd[row], strict=True)),
            )
            for row, rounds in enumerate(self.rounds)
        ]
        return tokens

    def run_to_end(self) -> None:
        """Decode until every row is done, and drop the tokens."""
        while not all(self.done):
            self.step(BURST)

    def _logprobs(self, row: int, logprobs: Sequence[Logprobs | None]) -> list[TokenLogprob] | None:
        wanted = self._requests[row].params.logprobs
        if wanted is None:
            return None
        return [
            TokenLogprob(float(entry.chosen_B), tuple(zip(entry.top_id_Bj[:wanted].tolist(), entry.top_Bj[:wanted].tolist(), strict=True)))
            for entry in logprobs
            if entry is not None
        ]

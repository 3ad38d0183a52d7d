"""A batch of requests: prefilled together, then decoded together burst by burst, on a runner's cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from l4jax.answer import NO_ROUNDS, NewTokens, Rounds
from l4jax.decoding.draft import DraftState
from l4jax.decoding.generate import BURST, DecodeState, DecodeTokens
from l4jax.decoding.plan import Speculation
from l4jax.decoding.sampling import Logprobs, TokenCounts, batch_features, sampling_rows
from l4jax.decoding.speculate import SpeculationState
from l4jax.parallel.arrays import host_array
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
        # Rows that fill up the bucket repeat the last request and are finished from the start.
        padding = runner.row_bucket(len(requests)) - len(requests)
        padded = [*requests, *[requests[-1]] * padding]
        params = [r.params for r in padded]
        self._features = batch_features(params)
        self._rows = sampling_rows(params, [r.seed for r in padded], [r.stop_ids for r in padded], runner.config.vocab_size)
        counts = self._prompt_counts(padded) if self._features.adjusted else None
        prompts = [r.token_ids for r in requests]
        self._plan = runner.speculation(len(prompts), max(map(len, prompts))) if plan == "auto" else plan
        self._lengths = list(map(len, prompts))
        first, first_logprobs, hidden_BD = runner.prefill(prompts, self._rows, counts, self._features, drafting=self._plan is not None)
        self._draft = None if hidden_BD is None else DraftState((), runner.commit_hidden(hidden_BD))
        self.rounds = [Rounds(0, 0, (0,) * self._plan.tree.depth) if self._plan else NO_ROUNDS] * len(requests)
        self._first: list[NewTokens] | None = [
            NewTokens([int(token)], self._logprobs(row, [logprobs]))
            for row, (token, logprobs) in enumerate(zip(first, first_logprobs, strict=True))
        ]
        done = [row >= len(requests) or r.params.max_tokens == 1 or int(first[row]) in r.stop_ids for row, r in enumerate(padded)]
        token_B = [*first.tolist(), *[0] * padding]
        if counts is not None:
            output_BV = np.zeros(counts.output_BV.shape, np.int32)
            output_BV[np.arange(len(padded)), token_B] = 1
            counts = dataclasses.replace(counts, output_BV=host_array(output_BV, np.int32))
        state = DecodeState(
            cache=(),
            token_B=host_array(token_B, np.int32),
            length_B=host_array([len(r.token_ids) for r in padded], np.int32),
            produced_B=host_array([1] * len(padded), np.int32),
            done_B=host_array(done, bool),
            counts=counts,
        )
        self._state = runner.commit(state)
        self.done = done[: len(requests)]

    def finish(self, row: int) -> None:
        """End a row from outside (a stop string was found)."""
        self.done[row] = True
        done_B = [*self.done, *[True] * (len(self._state.done_B) - len(self.done))]
        self._state = self._runner.commit(dataclasses.replace(self._state, done_B=host_array(done_B, bool)))

    def step(self, steps: int) -> list[NewTokens]:
        """The next tokens of each row: the first call gives the prefill's, each later one up to ``steps``."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        self._runner.check_claim(self._claim)
        tokens = self._advance(steps)
        token_sB, logprobs, taken, done_B = jax.device_get((tokens.token_sB, tokens.logprobs, tokens.steps, tokens.done_B))
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
            self._state, tokens = self._runner.decode(self._state, self._rows, steps, self._features)
            return tokens
        assert self._draft is not None
        both = SpeculationState(self._state, self._draft)
        both, tokens, counted = self._runner.speculate(both, self._rows, steps, self._features, self._plan)
        self._state, self._draft = both.decode, both.draft
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

    def _prompt_counts(self, requests: Sequence[Request]) -> TokenCounts:
        V = self._runner.config.vocab_size
        in_prompt_BV = np.zeros((len(requests), V), bool)
        for row, request in zip(in_prompt_BV, requests, strict=True):
            row[np.asarray(request.token_ids)] = True
        return TokenCounts(host_array(in_prompt_BV, bool), host_array(np.zeros(in_prompt_BV.shape), np.int32))

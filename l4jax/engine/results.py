"""A step in flight, and its results: tokens for the scheduler, and what else each request asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Array

from l4jax.answer import NO_ROUNDS, Rounds
from l4jax.decoding.generate import DecodeTokens
from l4jax.decoding.sampling import NOT_FINITE, Logprobs
from l4jax.decoding.speculate import RoundCounts
from l4jax.engine.step import BurstRow, PieceRow, Results, RowResult, Step
from l4jax.parallel.arrays import to_host
from l4jax.parallel.spread import in_order
from l4jax.program_inputs import FirstTokens, Piece
from l4jax.request import TokenLogprob


@dataclasses.dataclass(frozen=True)
class RowOutput:
    """What a row got beside its tokens: their log-probabilities, if its request asked for them, and its rounds of speculation.

    A scored row has either the log-probabilities of the token after each token of its piece, or logits [T, V].
    """

    logprobs: list[TokenLogprob] | None = None
    rounds: Rounds = NO_ROUNDS
    logits_TV: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a scored prefill returns, in the order of its token ranks, and the piece, whose layout says which order that is."""

    logits_BAV: Array
    logprobs: Logprobs
    piece: Piece

    def on_host(self, values_BA: Array) -> np.ndarray:
        """Copy values of every position to the host, in the order of positions."""
        host = to_host(values_BA)
        layout = self.piece.layout
        return host if layout is None else in_order(host, np.asarray(layout.position_RBT), np.asarray(self.piece.start_B))


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A step in flight, and the arrays that it returns.

    ``wanted``: for each request in it, how many likeliest tokens it asked for beside log-probabilities; None if it asked for neither.
    """

    step: Step
    wanted: Mapping[int, int | None]
    first: FirstTokens | None = None
    scored: Scored | None = None
    burst: DecodeTokens | None = None
    round_counts: RoundCounts | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the devices have finished it."""
        scores = self.scored and self.scored.logits_BAV
        last = self.burst.done_B if self.burst else self.first.token_B if self.first else scores
        return last is None or cast(Any, last).is_ready()

    def read(self) -> tuple[Results, dict[int, RowOutput]]:
        """Wait for the devices. Returns the results, and what else each request got."""
        outputs: dict[int, RowOutput] = {}
        prefill = self._read_scores(outputs) if self.scored else self._read_first(outputs)
        return Results(prefill, self._read_burst(outputs)), outputs

    @property
    def to_read(self) -> Any:
        """The arrays that :meth:`read` copies to the host, without those of scores."""
        first, burst = self.first, self.burst
        return (
            first and (first.token_B, first.done_B, first.logprobs if self._wanted(self.step.pieces) else None),
            burst and (burst.token_sB, burst.done_B, burst.logprobs if self._wanted(self.step.rows) else None, self.round_counts),
        )

    def _wanted(self, rows: Sequence[PieceRow | BurstRow | None]) -> bool:
        return any(row is not None and self.wanted[row.request] is not None for row in rows)

    def _read_first(self, outputs: dict[int, RowOutput]) -> tuple[RowResult | None, ...]:
        if self.first is None:
            return ()
        rows = self.step.pieces
        token_B, done_B, logprobs = jax.device_get(self.to_read[0])
        results: list[RowResult | None] = [None] * len(rows)
        for i, row in enumerate(rows):
            if row is None:
                continue
            if token_B[i] == NOT_FINITE:
                results[i] = RowResult(failed=True)
            elif not row.last:
                results[i] = RowResult()
            else:
                results[i] = RowResult((int(token_B[i]),), ended=bool(done_B[i]))
                outputs[row.request] = RowOutput(self._logprobs(row, logprobs, slice(i, i + 1)))
        return tuple(results)

    def _read_scores(self, outputs: dict[int, RowOutput]) -> tuple[RowResult | None, ...]:
        """Read the scores. Logits are copied to the host only if a request did not ask for log-probabilities."""
        scored, rows = self.scored, self.step.pieces
        assert scored is not None
        wanted = [row is not None and self.wanted[row.request] is not None for row in rows]
        logprobs = jax.tree.map(scored.on_host, scored.logprobs) if any(wanted) else None
        no_logits = all(is_wanted for row, is_wanted in zip(rows, wanted, strict=True) if row is not None)
        logits_BTV = None if no_logits else scored.on_host(scored.logits_BAV)
        results: list[RowResult | None] = [None] * len(rows)
        for i, row in enumerate(rows):
            if row is None:
                continue
            length = len(row.tokens)
            if wanted[i]:
                assert logprobs is not None
                finite = np.isfinite(logprobs.top_Bj[i, :length]).all()
                outputs[row.request] = RowOutput(logprobs=self._logprobs(row, logprobs, (i, slice(length - row.last))))
            else:
                assert logits_BTV is not None
                own_TV = logits_BTV[i, :length].copy()
                finite = np.isfinite(own_TV).all()
                outputs[row.request] = RowOutput(logits_TV=own_TV)
            results[i] = RowResult(ended=row.last, failed=not finite)
        return tuple(results)

    def _read_burst(self, outputs: dict[int, RowOutput]) -> tuple[RowResult | None, ...]:
        if self.burst is None:
            return ()
        rows = self.step.rows
        token_sB, done_B, logprobs, round_counts = jax.device_get(self.to_read[1])
        results: list[RowResult | None] = [None] * len(rows)
        drawn_sB = token_sB != -1
        count_B = np.where(drawn_sB.all(axis=0), len(token_sB), drawn_sB.argmin(axis=0)).tolist()
        done, columns = done_B.tolist(), token_sB.T.tolist()
        for i, row in enumerate(rows):
            if row is None:
                continue
            tokens = tuple(columns[i][: count_B[i]])
            failed = NOT_FINITE in tokens
            results[i] = RowResult(failed=True) if failed else RowResult(tokens, ended=done[i])
            if not failed:
                rounds = NO_ROUNDS if round_counts is None else _rounds(round_counts, i)
                outputs[row.request] = RowOutput(self._logprobs(row, logprobs, (slice(count_B[i]), i)), rounds)
        return tuple(results)

    def _logprobs(self, row: PieceRow | BurstRow, logprobs: Logprobs | None, index: Any) -> list[TokenLogprob] | None:
        """The row's log-probabilities, which are at this index; None if its request did not ask for them."""
        wanted = self.wanted[row.request]
        if wanted is None or logprobs is None:
            return None
        own: Logprobs = jax.tree.map(lambda leaf: leaf[index], logprobs)
        listed = zip(own.chosen_B.tolist(), own.top_id_Bj[:, :wanted].tolist(), own.top_Bj[:, :wanted].tolist(), strict=True)
        return [TokenLogprob(chosen, tuple(zip(ids, values, strict=True))) for chosen, ids, values in listed]


def _rounds(counts: RoundCounts, row: int) -> Rounds:
    return Rounds(int(counts.rounds_B[row]), int(counts.drafted_B[row]), tuple(counts.accepted_Bd[row].tolist()))

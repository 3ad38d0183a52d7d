"""Short calls of a scheduler, and its steps in words."""

from __future__ import annotations

import dataclasses

from l4jax.engine.options import Options
from l4jax.engine.pages import PageShape
from l4jax.engine.scheduler import Scheduler
from l4jax.engine.sequence import Sequence
from l4jax.engine.step import BurstRow, News, PieceRow, Plan, Results, RowResult, Step

SMALL = Options(
    shape=PageShape(4),
    full_pages=16,
    local_pages=0,
    slots=2,
    row_buckets=(1, 2),
    piece_lengths=(4, 8),
    piece_rows=(1, 2),
    piece_tokens=16,
    short_steps=1,
    long_steps=3,
)
CHUNKED = dataclasses.replace(SMALL, shape=PageShape(4, chunk=8), local_pages=8)
DRAFTED = dataclasses.replace(SMALL, plans=((1, Plan("chain:2", 2)), (2, None)), drafter=True)
LATEST: dict[int, Sequence] = {}
"""The sequence that was added last under each number."""


def told(step: Step | None) -> list[str]:
    """A step in words: each row's request, slot, tokens and pages."""
    if step is None:
        return []
    words = [f"drop {request}" for request in step.drops]
    words += [f"save {s.request} of slot {s.slot}: {s.full} {s.local}" for s in step.saves]
    words += [f"zero {pages}" for pages in (step.zero_full, step.zero_local) if pages]
    words += [f"load {s.request} to slot {s.slot}: {s.full} {s.local}" for s in step.loads]
    for row in step.pieces:
        words.append("-")
        if row is not None:
            marks = " first" * row.first + " last" * row.last + " scored" * step.prefill.scores
            place = f"{row.start}-{row.start + len(row.tokens)} of {step.prefill.length}"
            words[-1] = f"piece {row.request} in {row.slot}: {place} {row.full} {row.local}{marks}"
    for row in step.rows:
        words.append("-")
        if row is not None:
            how = f" {step.burst.plan.name}" if step.burst.plan else ""
            words[-1] = f"{step.burst.steps} rounds{how} {row.request} in {row.slot}: before {row.limit} {row.full} {row.local}"
    return words


def finish(
    scheduler: Scheduler, step: Step, *, ended: tuple[int, ...] = (), failed: tuple[int, ...] = (), tokens: int | None = None
) -> list[News]:
    """Finish a step: a last piece gets one token, a burst's row one for each round (or ``tokens``); these requests end or fail.

    A scored piece gets none, and the last one ends.
    """

    def result(row: PieceRow | BurstRow | None) -> RowResult | None:
        if row is None:
            return None
        if isinstance(row, PieceRow) and step.prefill.scores:
            return RowResult((), row.last, row.request in failed)
        if isinstance(row, PieceRow):
            count = int(row.last)
        else:
            count = min(step.burst.steps if tokens is None else tokens, row.limit - LATEST[row.request].committed)
        return RowResult((7,) * count, row.request in ended, row.request in failed)

    return scheduler.finish(step, Results(tuple(map(result, step.pieces)), tuple(map(result, step.rows))))


def output(sequence: Sequence) -> list[int]:
    """The tokens after the prompt."""
    return sequence.tokens[sequence.prompt_length :]


def added(scheduler: Scheduler, request: int, prompt: range, most: int = 8, **fields: object) -> Sequence:
    sequence = Sequence(request, list(prompt), len(prompt) + most, **fields)
    scheduler.add(sequence)
    LATEST[request] = sequence
    return sequence


def prefilled(scheduler: Scheduler, request: int, prompt: range, most: int = 8, **fields: object) -> Sequence:
    """Add a request and prefill it, with nothing left in flight."""
    sequence = added(scheduler, request, prompt, most, **fields)
    while sequence.committed < len(prompt):
        finish(scheduler, scheduler.next())
    return sequence

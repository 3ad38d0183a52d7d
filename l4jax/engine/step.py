"""What the scheduler tells the runner to dispatch, and what the runner returns.

A :class:`Step` is dispatched in this order: its drops, its saves, its zeroed pages, its loads, its prefill, its burst. Steps are
dispatched in the order in which the scheduler made them, and the devices run everything in the order of dispatch. So a page or a slot
may be given to another sequence while a step that writes it is still in flight.

A program's rows are those of data rank 0, then those of data rank 1, and so on, as many for each; None is padding. Slots
are numbered the same way: slot ``i`` belongs to data rank ``i // slots``. Pages are numbered on each data rank from 0. Page tables
list pages from the first position on (``full``), or from the first position of the row's attention chunk on (``local``, () without
chunks): at least one page of each kind that the model has. The drafter's layers use the same two tables (see ``pages``).

The rows of a program share one loop over pages, up to the end of the longest row, so every row reads that many pages. What a
row reads after its own end is masked, but 0 x NaN is NaN, so no row may read a page that may hold another row's NaN. Therefore the runner
pads a table with the row's own last page (``engine.tables``). A padding row reads page 0, whatever it holds: its results are dropped,
as are those of a row that is done.

The next step may run a failed row again before the host knows that it failed. That spoils no other row: the failed row writes only
pages of its own, the pages that it shares were verified before, and its own are zeroed before another sequence gets them.
"""

from __future__ import annotations

import dataclasses
from collections import abc

from l4jax.engine.sequence import Sequence

Table = tuple[int, ...]
PageOnRank = tuple[int, int]
"""A data rank, and one of its pages."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a burst speculates: the name of a tree, and how many levels of drafted tokens it has."""

    name: str
    depth: int


@dataclasses.dataclass(frozen=True, slots=True)
class Save:
    """Copy a slot's state and these pages (the drafter's too) to host memory, for this request.

    The copy is kept until its :class:`Load`, or until :attr:`Step.drops` names the request.
    """

    request: int
    slot: int
    full: Table
    local: Table


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """Copy the request's saved state to this slot, and the first of its saved pages to these pages."""

    request: int
    slot: int
    full: Table
    local: Table


@dataclasses.dataclass(frozen=True, slots=True)
class PieceRow:
    """A piece of one sequence's prefill: ``tokens``, the first of which is at position ``start``.

    ``first``: it is the sequence's first piece in this slot. The slot's state is reset for the request, and the tokens ``before`` (all
    those before ``start``, computed by others or earlier) are counted in it. Tokens at positions before ``prompt_length`` count as the
    prompt's. Later ones, in ``before`` or ``tokens``, were produced before a preemption, and count as output.

    ``last``: the piece ends the prefill. Its program draws output token number ``start + len(tokens) - prompt_length``, counted from 0, and
    writes it to the slot; the row decodes from the next step on. ``following``: the token after the piece, of which the drafter's last
    entry is made; -1 if it is the token that is drawn. ``local``: the pages of the chunk that the piece's last token is in. A piece begins
    at a chunk's boundary, or ends in the chunk in which it begins.

    A scored sequence's pieces draw nothing. It ends with its ``last`` piece, whose ``following`` is -1 too. It has no prefix hit, so
    its ``first`` piece is at position 0. If it is preempted, all its pieces are run again. The engine drops earlier scores when it reads
    the results of a ``first`` piece; results of pieces from before the preemption may still come until then.
    """

    request: int
    slot: int
    start: int
    tokens: tuple[int, ...]
    before: tuple[int, ...]
    first: bool
    last: bool
    following: int
    prompt_length: int
    full: Table
    local: Table


@dataclasses.dataclass(frozen=True, slots=True)
class Prefill:
    """One call of a prefill program: rows, each padded to ``length`` tokens. With a drafter it also writes the drafter's entries.

    ``scores``: all rows are of scored sequences (otherwise none is), and the program that scores runs them. It returns logits or
    log-probabilities at all positions, draws no token and writes no drafter entries.
    """

    length: int
    rows: tuple[PieceRow | None, ...]
    scores: bool


@dataclasses.dataclass(frozen=True, slots=True)
class BurstRow:
    """A row of a burst. It runs no token at position ``limit`` or later, and idles there until the burst ends.

    ``local``: the pages of the chunk that position ``limit`` - 1 is in.
    """

    request: int
    slot: int
    limit: int
    full: Table
    local: Table


@dataclasses.dataclass(frozen=True, slots=True)
class Burst:
    """One call of a decode program, or with a plan of a speculation program: at most ``steps`` rounds.

    A round gives each row that is not done and not at its limit at least one token, and at most the plan's depth + 1. A burst
    ends early only when no row is left. With a drafter it also writes the drafter's entries of all tokens that it runs, even without
    a plan, so any later burst may have one.
    """

    steps: int
    plan: Plan | None
    rows: tuple[BurstRow | None, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What to dispatch next; see the module for the order.

    ``drops``: requests that ended while their copies were in host memory; the copies are dropped. ``zero_full``, ``zero_local``: pages to
    zero, because they may hold NaN (a masked key still multiplies its value); the drafter's pages of these numbers too.
    """

    number: int
    drops: tuple[int, ...]
    saves: tuple[Save, ...]
    zero_full: tuple[PageOnRank, ...]
    zero_local: tuple[PageOnRank, ...]
    loads: tuple[Load, ...]
    prefill: Prefill | None
    burst: Burst | None

    @property
    def pieces(self) -> tuple[PieceRow | None, ...]:
        """The prefill's rows, if there is one."""
        return self.prefill.rows if self.prefill else ()

    @property
    def rows(self) -> tuple[BurstRow | None, ...]:
        """The burst's rows, if there is one."""
        return self.burst.rows if self.burst else ()

    @property
    def requests(self) -> tuple[list[int | None], list[int | None]]:
        """The requests of its prefill's rows, and those of its burst's rows."""
        pieces = [None if row is None else row.request for row in self.pieces]
        return pieces, [None if row is None else row.request for row in self.rows]


@dataclasses.dataclass(frozen=True, slots=True)
class RowResult:
    """What a row got: its new tokens, whether it has ended, and whether it ``failed``: its logits were not finite.

    A failed row's tokens do not count. A piece that is not its prefill's last has no tokens, but may fail by the logits at its last token.
    A scored piece has none either; it fails by the logits at any of its tokens, and has ``ended`` if it is the last.
    """

    tokens: tuple[int, ...] = ()
    ended: bool = False
    failed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Results:
    """A step's results, row by row as in its prefill and its burst; a padding row's result is ignored."""

    prefill: tuple[RowResult | None, ...] = ()
    burst: tuple[RowResult | None, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class News:
    """What a step's results mean for one sequence: its new tokens. Its state says whether it has ended."""

    sequence: Sequence
    tokens: tuple[int, ...]


class StepDraft:
    """A step that is being planned: for each data rank, the rows of its prefill and of its burst.

    ``length``: that of its pieces, 0 before the first; ``scores``: whether its pieces are scored. ``active_rows``: rows that decode on the
    fullest data rank, whether or not all of them get pages. ``lack_pages``: data ranks on which a sequence did not get its pages.
    """

    def __init__(self, number: int, ranks: int) -> None:
        self.number = number
        self.drops: list[int] = []
        self.saves: list[Save] = []
        self.zero_full: list[PageOnRank] = []
        self.zero_local: list[PageOnRank] = []
        self.loads: list[Load] = []
        self.length = 0
        self.scores = False
        self.pieces: list[list[PieceRow]] = [[] for _ in range(ranks)]
        self.steps = 0
        self.plan: Plan | None = None
        self.active_rows = 0
        self.rows: list[list[BurstRow]] = [[] for _ in range(ranks)]
        self.lack_pages: set[int] = set()

    def takes(self, sequence: Sequence) -> bool:
        """Whether the step's prefill call may have a piece of the sequence's kind: the first piece decides, scored or not."""
        return not self.length or self.scores == sequence.scores

    def has(self, sequence: Sequence) -> bool:
        """Whether the sequence has a row in this step."""
        return bool(sequence.flights) and sequence.flights[-1].step == self.number

    def step(self, piece_rows: tuple[int, ...], row_buckets: tuple[int, ...]) -> Step | None:
        """The step, its rows padded on each data rank to one of these numbers; None if it is empty."""
        prefill = burst = None
        if any(self.pieces):
            prefill = Prefill(self.length, _with_padding(self.pieces, max(map(len, self.pieces)), piece_rows), self.scores)
        if any(self.rows):
            # Padded to the number of rows that chose the plan: otherwise each plan would need programs for fewer rows too.
            burst = Burst(self.steps, self.plan, _with_padding(self.rows, self.active_rows, row_buckets))
        copies = tuple(self.drops), tuple(self.saves), tuple(self.zero_full), tuple(self.zero_local), tuple(self.loads)
        return Step(self.number, *copies, prefill, burst) if any(copies) or prefill or burst else None


def _with_padding[Row](rows: abc.Sequence[abc.Sequence[Row]], least: int, buckets: tuple[int, ...]) -> tuple[Row | None, ...]:
    """The rows of data rank 0, then of 1, and so on, each rank's padded to the smallest bucket that has at least ``least`` rows."""
    bucket = next(bucket for bucket in buckets if bucket >= least)
    padded: list[Row | None] = []
    for own in rows:
        padded += [*own, *[None] * (bucket - len(own))]
    return tuple(padded)

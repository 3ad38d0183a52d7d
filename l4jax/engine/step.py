"""What the scheduler tells the runner to dispatch, and what the runner returns.

A :class:`Step` is dispatched in this order: its drops, its saves, its zeroed pages, its loads, its prefill, its burst. Steps are
dispatched in the order in which the scheduler gave them, and the devices run everything in the order of dispatch. That is what
lets a page or a slot be given to another sequence while a step that writes it is still on its way.

Rows are in the program's order: those of each data rank after one another, the same number for each, None for padding. Slots
are numbered the same way: slot ``i`` belongs to data rank ``i // slots``. Pages are numbered on each data rank from 0. Page tables
list pages from the first position on (``full``), or from the first position of the row's attention chunk on (``local``, () without
chunks): at least one page of each kind that the model has. The drafter's table is ``full`` too, and ``local`` in its chunk-local layers
(see ``pages``).

The rows of a program share one loop over pages, up to the end of the longest, so all of them read that many pages. What a
row reads after its own end is masked, but 0 x NaN is NaN: a row may read no page that another one may have spoilt. So a runner
pads a table by :func:`padded`, with the row's own last page. A padding row reads page 0, whatever that holds: its own results alone
can be spoilt, and they are dropped, as those of a row that is done are.

A row that fails spoils its own results alone too, although the next step may run it again before anyone knows: the pages that it
writes are in its own table only, those that it shares were verified before, and what it wrote is zeroed before another has it.
"""

from __future__ import annotations

import dataclasses
from collections import abc

from l4jax.engine.sequence import Sequence

Table = tuple[int, ...]
PageOnRank = tuple[int, int]
"""A data rank, and one of its pages."""


def padded(table: Table, count: int) -> Table:
    """A row's table, not empty, lengthened to ``count`` pages for a program whose longest row needs as many; see the module."""
    return table + table[-1:] * (count - len(table))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a burst speculates: the name of a tree, and how many levels of drafted tokens it has."""

    name: str
    depth: int


@dataclasses.dataclass(frozen=True, slots=True)
class Save:
    """Copy a slot's state and these pages (the drafter's too) to host memory, under the request's number.

    The copy is dropped after its :class:`Load`, or when :attr:`Step.drops` names the request.
    """

    request: int
    slot: int
    full: Table
    local: Table


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """Copy a saved slot's state to this slot, and as many of the saved pages as are listed, the first ones, to these."""

    request: int
    slot: int
    full: Table
    local: Table


@dataclasses.dataclass(frozen=True, slots=True)
class PieceRow:
    """A piece of one sequence's prefill: ``tokens``, of which the first is at position ``start``.

    ``first``: it is the first in this slot, whose state must be reset for the request, as if the tokens ``before`` had been run
    in it: all those before ``start``, which other pieces do not repeat. Tokens at positions before ``prompt_length`` are the
    prompt, which the slot's counts take in as such. Later ones, of ``before`` as of ``tokens``, are output of an earlier
    stay in the cache: the slot counts each as drawn and produced. ``last``: the piece ends the prefill, so its
    program draws output token number ``start + len(tokens) - prompt_length``, counted from 0, and writes it to the slot; the row
    decodes from the next step on. ``following``: the token after the piece, which the drafter's last entry is made of; -1: the token
    that is drawn. ``local``: the pages of the chunk that the piece's last token is in. A piece begins at a chunk's boundary, or
    ends in its first token's chunk.

    A scored sequence's pieces draw nothing: it ends with its ``last``, whose ``following`` is -1 too. It has no hits, so its ``first``
    is at position 0. If it is preempted, all its pieces come again from there: what it got before a ``first`` piece is void, and the
    engine drops it when it reads that piece's results. Until then results of older pieces may still come.
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
    """One call of a prefill program: rows, each padded to ``length`` tokens. With a drafter it also makes the drafter's entries.

    ``scores``: all rows are of scored sequences, and another program runs them: it returns the logits of all positions, or numbers
    made of them, draws no token and makes no drafter entries. Otherwise none is.
    """

    length: int
    rows: tuple[PieceRow | None, ...]
    scores: bool


@dataclasses.dataclass(frozen=True, slots=True)
class BurstRow:
    """A row of a burst. It stops before position ``limit``: it is idle from there on, as if it were done, until a later burst.

    ``local``: the pages of the chunk that ``limit`` - 1 is in.
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
    ends early only when no row is left. With a drafter it also makes the drafter's entries, of all tokens that it adds and
    without a plan too: so any later burst may have one.
    """

    steps: int
    plan: Plan | None
    rows: tuple[BurstRow | None, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What to dispatch next; see the module for the order.

    ``drops``: requests that ended while their copies were in host memory; the copies are dropped. ``zero_full`` and
    ``zero_local``: pages that may hold numbers that are not finite (a masked key still multiplies its value); the drafter's pages of the
    same numbers too.
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
        """Whose the rows of its prefill and of its burst are."""
        pieces = [None if row is None else row.request for row in self.pieces]
        return pieces, [None if row is None else row.request for row in self.rows]


@dataclasses.dataclass(frozen=True, slots=True)
class RowResult:
    """What a row got: its new tokens, whether it is done, and whether its logits were not finite (then its tokens do not count).

    A piece that is not its prefill's last has no tokens, but ``failed`` if the logits at its last token were not finite. A scored piece
    has none either: it has ``ended`` if it is the last, and ``failed`` if the logits at any of its tokens were not finite.
    """

    tokens: tuple[int, ...] = ()
    ended: bool = False
    failed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Results:
    """A step's results, row by row as in its prefill and its burst; what stands for a padding row is not looked at."""

    prefill: tuple[RowResult | None, ...] = ()
    burst: tuple[RowResult | None, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class News:
    """What a step's results mean for one sequence: its new tokens. Its state says whether it has ended."""

    sequence: Sequence
    tokens: tuple[int, ...]


class StepDraft:
    """A step that is being put together: of each data rank, the rows of its prefill and of its burst.

    ``length``: of its pieces, 0 before the first; ``scores``: whether they are those of scored sequences. ``active_rows``: rows that the
    burst has on the fullest data rank if none sits it out. ``lack_pages``: data ranks on which a sequence has to sit it out.
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
        """The step, with rows padded to one of these numbers on each data rank; None if there is nothing in it."""
        prefill = burst = None
        if any(self.pieces):
            prefill = Prefill(self.length, _with_padding(self.pieces, max(map(len, self.pieces)), piece_rows), self.scores)
        if any(self.rows):
            # As many as decided on the plan: otherwise each plan would need a program for each smaller number too.
            burst = Burst(self.steps, self.plan, _with_padding(self.rows, self.active_rows, row_buckets))
        copies = tuple(self.drops), tuple(self.saves), tuple(self.zero_full), tuple(self.zero_local), tuple(self.loads)
        return Step(self.number, *copies, prefill, burst) if any(copies) or prefill or burst else None


def _with_padding[Row](rows: abc.Sequence[abc.Sequence[Row]], least: int, buckets: tuple[int, ...]) -> tuple[Row | None, ...]:
    """The rows of each data rank after one another, each rank's padded to the lowest bucket of at least this many."""
    bucket = next(bucket for bucket in buckets if bucket >= least)
    padded: list[Row | None] = []
    for own in rows:
        padded += [*own, *[None] * (bucket - len(own))]
    return tuple(padded)

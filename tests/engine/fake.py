"""A device that runs the scheduler's steps without any model, and checks all that it reads.

What it keeps for a position is a number made of the whole prefix up to there (of the drafter's entry, also of the token after
it), so a page that holds another sequence's tokens, other positions, or nothing yet is noticed when it is read. With
``deterministic`` options the number is also made of which program computed it. A request may fail at a position: what it writes from there
on is :data:`NAN`, which no page in another row's table may hold, not even after that row's tokens.
"""

from __future__ import annotations

import dataclasses
import random

from l4jax.engine.options import Options
from l4jax.engine.sequence import Sequence
from l4jax.engine.step import BurstRow, PieceRow, Results, RowResult, Step

NAN = "NaN"
STALE = "stale"
DECODED = -1


def mixed(*values: int) -> int:
    return hash(values)


class Truth:
    """What a request gets alone: its tokens, and what the cache must hold at each position."""

    def __init__(self, options: Options, sequence: Sequence, fails_at: int | None) -> None:
        self.request, self.prompt_length, self.fails_at = sequence.request, sequence.prompt_length, fails_at
        self.tokens = list(sequence.tokens)
        self.prefix: list[int] = []
        value = mixed(*(b"alone" if sequence.scope is None else sequence.scope))
        for position in range(sequence.max_length - 1):
            value = mixed(value, self.tokens[position])
            self.prefix.append(value)
            if position + 1 >= self.prompt_length:
                self.tokens.append(value % 3)
                if value % 61 == 0:  # a stop token
                    break
        self.drafted = [mixed(value, token) for value, token in zip(self.prefix, self.tokens[1:], strict=True)]
        self.kept = self.prefix
        if options.deterministic:
            self.kept = [mixed(value, program) for value, program in zip(self.prefix, self._programs(options), strict=True)]

    def _programs(self, options: Options) -> list[int]:
        (length,), chunk, programs = options.piece_lengths, options.shape.chunk, [DECODED] * len(self.prefix)
        start = 0
        while start < self.prompt_length:
            end = min(self.prompt_length, start - start % length + length)
            if chunk and start % chunk:
                end = min(end, start - start % chunk + chunk)
            programs[start:end] = [start] * (end - start)
            start = end
        return programs


@dataclasses.dataclass
class Slot:
    truth: Truth
    length: int
    done: bool = False


class FakeDevice:
    """``full``, ``local``, ``drafted``: what each page of each data rank holds; ``host``: what was saved."""

    def __init__(self, options: Options, dice: random.Random) -> None:
        self.options, self.dice = options, dice
        self.truths: dict[int, Truth] = {}
        shape, ranks = options.shape, range(options.data_ranks)
        self.full = [[[0] * shape.block for _ in range(options.full_pages)] for _ in ranks]
        self.drafted = [[[0] * shape.block for _ in range(options.full_pages)] for _ in ranks]
        self.local = [[[0] * shape.page_size for _ in range(options.local_pages)] for _ in ranks]
        self.slots: dict[int, Slot] = {}
        self.host: dict[int, tuple] = {}
        self.fullest = 0.0  # the chance that a round accepts all

    def run(self, step: Step) -> Results:
        shape, slots = self.options.shape, self.options.slots
        for save in step.saves:
            pages = [[list(pool[save.slot // slots][page]) for page in save.full] for pool in (self.full, self.drafted)]
            local = [list(self.local[save.slot // slots][page]) for page in save.local]
            self.host[save.request] = (*pages, local, dataclasses.replace(self.slots[save.slot]))
        for rank, page in step.zero_full:
            self.full[rank][page], self.drafted[rank][page] = [0] * shape.block, [0] * shape.block
        for rank, page in step.zero_local:
            self.local[rank][page] = [0] * shape.page_size
        for load in step.loads:
            full, drafted, local, slot = self.host.pop(load.request)
            rank = load.slot // slots
            for pool, table, saved in (
                (self.full, load.full, full),
                (self.drafted, load.full, drafted),
                (self.local, load.local, local),
            ):
                for page, contents in zip(table, saved[: len(table)], strict=True):
                    pool[rank][page] = contents
            self.slots[load.slot] = slot
        prefill = [row and self._piece(row) for row in step.prefill.rows] if step.prefill else []
        return Results(tuple(prefill), tuple(self._burst(step)))

    def _piece(self, row: PieceRow) -> RowResult:
        truth, end = self.truths[row.request], row.start + len(row.tokens)
        if row.first:
            self.slots[row.slot] = Slot(truth, row.start)
        slot = self.slots[row.slot]
        assert slot.truth is truth and slot.length == row.start and not slot.done
        assert list(row.tokens) == truth.tokens[row.start : end] and row.prompt_length == truth.prompt_length
        assert row.last if row.following < 0 else row.following == truth.tokens[end]
        chunk = self.options.shape.chunk
        assert chunk is None or row.start % chunk == 0 or (end - 1) // chunk == row.start // chunk
        if truth.fails_at is None or truth.fails_at >= row.start:  # otherwise the piece before has failed, which nobody knows yet
            self._check_reads(row, row.start, drafts=self.options.drafter)
        self._write(row, truth, row.start, end, row.start, drafts=True)
        slot.length = end
        if truth.fails_at is not None and truth.fails_at < end:
            slot.done = row.last
            return RowResult(failed=True)
        if not row.last:
            return RowResult()
        slot.done = end == len(truth.tokens) - 1
        return RowResult((truth.tokens[end],), slot.done)

    def _burst(self, step: Step) -> list[RowResult | None]:
        if step.burst is None:
            return []
        depth = step.burst.plan.depth if step.burst.plan else 0
        got: dict[int, list[int]] = {row.slot: [] for row in step.burst.rows if row}
        assert len(got) == sum(row is not None for row in step.burst.rows)
        failed = set()
        for row in filter(None, step.burst.rows):
            slot = self.slots[row.slot]
            assert slot.truth.request == row.request and slot.length <= row.limit
            if not slot.done and slot.length < row.limit:
                self._check_reads(row, slot.length, drafts=row.drafts)
        for _ in range(step.burst.steps):
            for row in filter(None, step.burst.rows):
                slot = self.slots[row.slot]
                if slot.done or slot.length == row.limit:
                    continue
                truth, chunk = slot.truth, self.options.shape.chunk
                room = min(depth, chunk - 1 - slot.length % chunk) if chunk else depth
                accepted = (room if self.dice.random() < self.fullest else self.dice.randint(0, room)) if row.drafts else 0
                end = min(slot.length + 1 + accepted, len(truth.tokens) - 1)
                self._write(row, truth, slot.length, end, DECODED, drafts=row.drafts, stale=depth > 0)
                got[row.slot] += truth.tokens[slot.length + 1 : end + 1]
                slot.length = end
                slot.done = end == len(truth.tokens) - 1
                if truth.fails_at is not None and truth.fails_at < end:
                    slot.done = True
                    failed.add(row.slot)
        return [
            row and (RowResult(failed=True) if row.slot in failed else RowResult(tuple(got[row.slot]), self.slots[row.slot].done))
            for row in step.burst.rows
        ]

    def _check_reads(self, row: PieceRow | BurstRow, length: int, *, drafts: bool) -> None:
        """All positions before ``length`` must hold what this sequence's do; nothing in its tables may be NaN."""
        rank, shape, truth = row.slot // self.options.slots, self.options.shape, self.truths[row.request]
        block, page_size = shape.block, shape.page_size
        expected = [(self.full, row.full, block, 0, truth.kept)]
        if drafts:
            expected.append((self.drafted, row.full, block, 0, truth.drafted))
        if shape.chunk:
            expected.append((self.local, row.local, page_size, length // shape.chunk * shape.chunk, truth.kept))
            # The table is that of the chunk in which the new tokens are kept; a piece that begins a chunk reads none of it.
            if length % shape.chunk == 0:
                expected.pop()
        for pool, table, size, start, values in expected:
            for i, begin in enumerate(range(start, length, size)):
                end = min(begin + size, length)
                found = pool[rank][table[i]][: end - begin]
                assert found == values[begin:end], (row, begin, end, "holds something else")
        for pool, table in ((self.full, row.full), (self.drafted, row.full), (self.local, row.local)):
            assert all(NAN not in pool[rank][page] for page in table), (row, "may read NaN")

    def _write(
        self, row: PieceRow | BurstRow, truth: Truth, begin: int, end: int, program: int, *, drafts: bool, stale: bool = False
    ) -> None:
        rank, shape, options = row.slot // self.options.slots, self.options.shape, self.options
        for position in range(begin, end):
            value: int | str = mixed(truth.prefix[position], program) if options.deterministic else truth.prefix[position]
            drafted: int | str = truth.drafted[position]
            if truth.fails_at is not None and position >= truth.fails_at:
                value = drafted = NAN
            page = row.full[position // shape.block]
            self.full[rank][page][position % shape.block] = value
            if options.drafter and (drafts or stale):
                self.drafted[rank][page][position % shape.block] = drafted if drafts or drafted == NAN else STALE
            if shape.chunk and position // shape.chunk == (end - 1) // shape.chunk:
                place = position % shape.chunk
                self.local[rank][row.local[place // shape.page_size]][place % shape.page_size] = value

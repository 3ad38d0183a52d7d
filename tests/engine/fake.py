"""A device that runs the scheduler's steps without any model, and checks all that it reads.

It stores for each position a hash of the whole prefix up to there (for the drafter's entry, also of the token after it). So it notices a
read of a page that holds another sequence's tokens, other positions, or nothing yet. With ``deterministic`` options the hash also covers
which program computed it. A request may fail at a position: from there on it writes :data:`NAN`. No page that another row reads may hold
NAN, not even after that row's tokens, neither when the program begins nor when it ends. All rows read as many pages as the longest needs.
Each slot counts the tokens of its prompt and of its output. A scored prefill neither reads nor writes the drafter's entries.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter, abc

from l4jax.engine.options import Options
from l4jax.engine.sequence import Sequence
from l4jax.engine.step import BurstRow, PieceRow, Results, RowResult, Step, Table

NAN = "NaN"
DECODED = -1


def padded(table: Table, count: int) -> Table:
    """A row's table, which is not empty, padded to ``count`` pages, those of the program's longest row; see ``engine.step``."""
    return table + table[-1:] * (count - len(table))


def mixed(*values: int) -> int:
    return hash(values)


class Truth:
    """What a request gets alone: its tokens, and what the cache must hold at each position.

    Without a scope the contents are its own, whatever the tokens. A scored one gets no tokens and has no drafter entries.
    """

    def __init__(self, options: Options, sequence: Sequence, fails_at: int | None) -> None:
        self.request, self.prompt_length, self.fails_at = sequence.request, sequence.prompt_length, fails_at
        self.scores = sequence.scores
        self.tokens = list(sequence.tokens)
        self.prompt = Counter(self.tokens)
        self.prefix: list[int] = []
        value = mixed(0, sequence.request) if sequence.scope is None else mixed(*sequence.scope)
        for position in range(sequence.max_length - 1):
            value = mixed(value, self.tokens[position])
            self.prefix.append(value)
            if position + 1 >= self.prompt_length and not self.scores:
                self.tokens.append(value % 3)
                if value % 61 == 0:  # a stop token
                    break
        self.drafted: list[int] = []
        if not self.scores:
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
    failed: bool = False
    prompt: Counter[int] = dataclasses.field(default_factory=Counter)
    output: Counter[int] = dataclasses.field(default_factory=Counter)
    produced: int = 0

    def count(self, tokens: abc.Sequence[int], start: int, prompt_length: int) -> None:
        """Count tokens from position ``start`` on as the prompt's or as output."""
        of_prompt = max(0, prompt_length - start)
        self.prompt.update(tokens[:of_prompt])
        self.output.update(tokens[of_prompt:])
        self.produced += len(tokens[of_prompt:])

    def check(self) -> None:
        """The counts must be those of the sequence's tokens, the one that is not in the cache yet included."""
        output = self.truth.tokens[self.truth.prompt_length : self.length + 1]
        assert self.prompt == self.truth.prompt, (self, "counts another prompt")
        assert (self.output, self.produced) == (Counter(output), len(output)), (self, "counts another output")

    def copy(self) -> Slot:
        return dataclasses.replace(self, prompt=Counter(self.prompt), output=Counter(self.output))


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
        for request in step.drops:
            del self.host[request]
        for save in step.saves:
            pages = [[list(pool[save.slot // slots][page]) for page in save.full] for pool in (self.full, self.drafted)]
            local = [list(self.local[save.slot // slots][page]) for page in save.local]
            self.host[save.request] = (*pages, local, self.slots[save.slot].copy())
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
        return Results(tuple(self._prefill(step)), tuple(self._burst(step)))

    def _prefill(self, step: Step) -> list[RowResult | None]:
        if step.prefill is None:
            return []
        for row in filter(None, step.pieces):
            if row.first:
                self.slots[row.slot] = Slot(self.truths[row.request], row.start)
                self.slots[row.slot].count(row.before, 0, row.prompt_length)
        assert all(self.truths[row.request].scores == step.prefill.scores for row in step.pieces if row), "pieces of both kinds"
        live = self._live(step.pieces)
        self._check_not_spoilt(live, step.pieces)
        results = [row and self._piece(row) for row in step.pieces]
        self._check_not_spoilt(live, step.pieces)
        return results

    def _piece(self, row: PieceRow) -> RowResult:
        truth, end = self.truths[row.request], row.start + len(row.tokens)
        slot = self.slots[row.slot]
        assert slot.truth is truth and slot.length == row.start and not slot.done
        assert list(row.tokens) == truth.tokens[row.start : end] and row.prompt_length == truth.prompt_length
        assert row.following == (-1 if row.last else truth.tokens[end])
        assert not truth.scores or (row.first, row.last) == (row.start == 0, end == len(truth.tokens)), (row, "is scored in part")
        chunk = self.options.shape.chunk
        assert chunk is None or row.start % chunk == 0 or (end - 1) // chunk == row.start // chunk
        slot.count(row.tokens, row.start, row.prompt_length)
        if not slot.failed:  # a piece before may have failed, which the host does not know yet
            self._check_reads(row, row.start)
        self._write(row, truth, row.start, end, row.start)
        slot.length = end
        slot.failed = truth.fails_at is not None and truth.fails_at < end
        if slot.failed:
            slot.done = row.last
            return RowResult(failed=True)
        if truth.scores:
            slot.done = row.last
            return RowResult(ended=row.last)
        if not row.last:
            return RowResult()
        slot.count(truth.tokens[end : end + 1], end, row.prompt_length)
        slot.done = end == len(truth.tokens) - 1
        return RowResult((truth.tokens[end],), slot.done)

    def _burst(self, step: Step) -> list[RowResult | None]:
        if step.burst is None:
            return []
        depth = step.burst.plan.depth if step.burst.plan else 0
        got: dict[int, list[int]] = {row.slot: [] for row in step.rows if row}
        assert len(got) == sum(row is not None for row in step.rows)
        for row in filter(None, step.rows):
            slot = self.slots[row.slot]
            assert slot.truth.request == row.request and slot.length <= row.limit and not slot.truth.scores
        live = self._live(step.rows)
        self._check_not_spoilt(live, step.rows)
        for row in live:
            self.slots[row.slot].check()
            self._check_reads(row, self.slots[row.slot].length)
        for _ in range(step.burst.steps):
            for row in filter(None, step.rows):
                slot = self.slots[row.slot]
                if slot.done or slot.length == row.limit:
                    continue
                truth, chunk = slot.truth, self.options.shape.chunk
                room = min(depth, chunk - 1 - slot.length % chunk) if chunk else depth
                accepted = room if self.dice.random() < self.fullest else self.dice.randint(0, room)
                end = min(slot.length + 1 + accepted, len(truth.tokens) - 1)
                self._write(row, truth, slot.length, end, DECODED)
                drawn = truth.tokens[slot.length + 1 : end + 1]
                slot.count(drawn, slot.length + 1, truth.prompt_length)
                got[row.slot] += drawn
                slot.length = end
                slot.failed = truth.fails_at is not None and truth.fails_at < end
                slot.done = slot.failed or end == len(truth.tokens) - 1
        self._check_not_spoilt(live, step.rows)
        slots = [row and self.slots[row.slot] for row in step.rows]
        return [
            slot and (RowResult(failed=True) if slot.failed else RowResult(tuple(got[row.slot]), slot.done))
            for row, slot in zip(step.rows, slots, strict=True)
        ]

    def _live(self, rows: abc.Iterable[PieceRow | BurstRow | None]) -> list[PieceRow | BurstRow]:
        """The rows whose results will count, unless they fail; those of other rows are dropped."""
        return [row for row in rows if row and not (self.slots[row.slot].done or self.slots[row.slot].failed)]

    def _check_not_spoilt(self, live: list[PieceRow | BurstRow], rows: tuple[PieceRow | BurstRow | None, ...]) -> None:
        """Check that no row reads a NaN, except its own if it has failed. Each reads as many pages as the longest row's table has."""
        full = max(len(row.full) for row in rows if row)
        local = max(len(row.local) for row in rows if row)
        for row in live:
            rank = row.slot // self.options.slots
            if not self.slots[row.slot].failed:
                pools = (self.full,) if self.truths[row.request].scores else (self.full, self.drafted)
                found = itertools.chain(
                    *(pool[rank][page] for pool in pools for page in set(padded(row.full, full))),
                    *(self.local[rank][page] for page in set(padded(row.local, local))),
                )
                assert NAN not in found, (row, "may read NaN")

    def _check_reads(self, row: PieceRow | BurstRow, length: int) -> None:
        """Check that all positions before ``length`` hold what belongs there in this sequence."""
        rank, shape, truth = row.slot // self.options.slots, self.options.shape, self.truths[row.request]
        block, page_size = shape.block, shape.page_size
        assert row.full and bool(row.local) == bool(shape.chunk), (row, "has no page")
        expected = [(self.full, row.full, block, 0, truth.kept)]
        if self.options.drafter and not truth.scores:
            expected.append((self.drafted, row.full, block, 0, truth.drafted))
        # The table is that of the chunk in which the new tokens are kept; a row that begins a chunk reads none of it.
        if shape.chunk and length % shape.chunk > 0:
            expected.append((self.local, row.local, page_size, length // shape.chunk * shape.chunk, truth.kept))
        for pool, table, size, start, values in expected:
            for i, begin in enumerate(range(start, length, size)):
                end = min(begin + size, length)
                found = pool[rank][table[i]][: end - begin]
                assert found == values[begin:end], (row, begin, end, "holds something else")

    def _write(self, row: PieceRow | BurstRow, truth: Truth, begin: int, end: int, program: int) -> None:
        rank, shape, options = row.slot // self.options.slots, self.options.shape, self.options
        for position in range(begin, end):
            value: int | str = mixed(truth.prefix[position], program) if options.deterministic else truth.prefix[position]
            fails = truth.fails_at is not None and position >= truth.fails_at
            if fails:
                value = NAN
            page = row.full[position // shape.block]
            self.full[rank][page][position % shape.block] = value
            if options.drafter and not truth.scores:
                self.drafted[rank][page][position % shape.block] = NAN if fails else truth.drafted[position]
            if shape.chunk and position // shape.chunk == (end - 1) // shape.chunk:
                place = position % shape.chunk
                self.local[rank][row.local[place // shape.page_size]][place % shape.page_size] = value

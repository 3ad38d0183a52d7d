"""Decides what the devices do next. Plain Python and deterministic: the same calls and results give the same steps.

The engine calls :meth:`Scheduler.next` and dispatches the step, until it returns None. Then it calls :meth:`Scheduler.finish` with the
results of the oldest step, and begins again. Two steps may be in flight, so a step is planned before the results of the one before it
are known: until then a sequence's cache length is only known within bounds (``Sequence.low``, ``high``).

The rules:

- Admission is first come, first served. A request needs a data rank with a slot and the pages for its prompt and one burst, and is not
  admitted before an older one. While a sequence under way lacks pages, nothing is admitted to its rank.
- A step has at most one prefill call and one burst. All pieces of a prefill call have one length, and all are scored or none is. The
  oldest sequence that can have a piece decides both; the others wait. A sequence whose prefill ends decodes from the next step on; a
  scored one ends with it.
- A burst's pages are reserved when it is planned: for rounds times (depth + 1) tokens after the upper bound of the cache length. Those
  that it did not need are taken back with its results.
- If pages run out, the newest sequence on the data rank is preempted, but never one older than the one that needs pages. If there
  is no newer one, or if results in flight will return a finished chunk's pages, the sequence sits the step out and keeps its pages. So the
  oldest goes on at once, or after the results in flight. A preempted sequence keeps its place in the order, and its output becomes part of
  its prompt. In deterministic mode it is saved to host memory instead, unless it has no output yet: recomputing a prompt is bit-equal.
- A burst ends at the end of the attention chunk, as does a piece that does not begin at a chunk's boundary, and the next chunk gets new
  pages. So a shared page is never written. A row that may be at its chunk's end already gets one more burst in that chunk, which
  may be idle.
- Pages enter the prefix cache when results have verified them; in deterministic mode only pages that a prefill wrote do.
- One plan is chosen for each burst, for all its rows. Bursts without a plan write the drafter's entries too, because these are made of
  the model's hidden states, which are gone after the burst.
- A request goes to the data rank that has a slot and the longest prefix of it, and among equals to the one with most pages. If a
  sequence there is computing more of its prefix, the request waits, and so do all after it.
- Pages that a failed or a discarded step may have written are zeroed before another sequence gets them.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools

from l4jax.engine.options import Options
from l4jax.engine.rank import DataRank
from l4jax.engine.sequence import Flight, Sequence, State, by_arrival
from l4jax.engine.step import BurstRow, Load, News, PieceRow, Results, RowResult, Save, Step, StepDraft

IN_FLIGHT = 2
"""Steps whose results may be unknown."""
_ANY = 1 << 30


class Scheduler:
    """The ``waiting`` sequences, in order of arrival, those under way on each data rank, and the steps in flight."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.ranks = [DataRank(number, options) for number in range(options.data_ranks)]
        self._by_request: dict[int, Sequence] = {}
        self.waiting: list[Sequence] = []
        self.preemptions = 0
        self._arrivals = 0
        self._number = 0
        self._steps: list[Step] = []  # in flight, the oldest first
        self._drops: list[int] = []  # for the next step

    @property
    def idle(self) -> bool:
        """Whether no sequence waits or is under way, and the runner has been told to drop the copies of ended ones."""
        return not self._by_request and not self._drops

    @property
    def in_flight(self) -> int:
        """Steps whose results have not been given to :meth:`finish`."""
        return len(self._steps)

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn. Raises ValueError if it may need more pages than there are."""
        self.options.check_fits(len(sequence.tokens), sequence.max_length)
        if sequence.request in self._by_request:
            raise ValueError(f"request {sequence.request} is under way already; expected another number for each request")
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self._by_request[sequence.request] = sequence
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now, by its caller's wish or at a stop string; its results in flight are ignored."""
        if not sequence.state.is_over:
            self._end(sequence, State.CANCELLED, unsure=bool(sequence.flights))

    def next(self, most_steps: int = _ANY) -> Step | None:
        """The step to dispatch next; None if there is nothing to do before :meth:`finish` or :meth:`add` is called.

        ``most_steps``: the most rounds that a burst may have. A call that returns None may have admitted or preempted a sequence, so other
        hosts must make it too.
        """
        active = self._active()
        if len(self._steps) == IN_FLIGHT or any(sequence.awaits_token for sequence in active):
            return None
        draft = StepDraft(self._number + 1, len(self.ranks))
        self._choose_burst(draft, active, most_steps)
        for sequence in active:
            self._add(draft, sequence)
        while (admitted := self._admitted(draft)) is not None:
            if admitted.state is State.PREFILL:
                self._add_piece(draft, admitted)
        draft.drops += self._drops
        self._drops.clear()
        for rank in self.ranks:
            draft.zero_full += rank.zero_full
            draft.zero_local += rank.zero_local
            rank.zero_full.clear()
            rank.zero_local.clear()
        step = draft.step(self.options.piece_rows, self.options.row_buckets)
        if step is not None:
            self._number = step.number
            self._steps.append(step)
        return step

    def finish(self, step: Step, results: Results) -> list[News]:
        """Take in the results of the oldest step in flight. Returns what each sequence that still awaits them has got."""
        assert self._steps and step is self._steps[0], "steps are finished in the order in which they were given"
        del self._steps[0]
        news = []
        for row, result in itertools.chain(zip(step.pieces, results.prefill, strict=True), zip(step.rows, results.burst, strict=True)):
            sequence = None if row is None else self._by_request.get(row.request)
            if sequence is not None and sequence.flights and sequence.flights[0].step == step.number:
                assert row is not None and result is not None
                self._take_in(sequence, row, result)
                news.append(News(sequence, () if result.failed else result.tokens))
        return news

    def digest(self) -> str:
        """A digest of everything that later steps depend on: equal on all hosts as long as they have had the same calls and results."""
        own = self.options, self._number, self._arrivals, self._drops, [(step.number, step.requests) for step in self._steps]
        found = hashlib.blake2b(repr(own).encode(), digest_size=16)
        for sequence in (*self.waiting, *self._active()):
            sequence.update_digest(found)
        for rank in self.ranks:
            rank.update_digest(found)
        return found.hexdigest()

    def check(self) -> None:
        """Raise AssertionError unless every slot and page is accounted for."""
        for rank in self.ranks:
            rank.check()
        active = self._active()
        assert len(active) + len(self.waiting) == len(self._by_request), "a sequence is lost"
        assert all(s.state in (State.PREFILL, State.RUNNING) for s in active), "an ended sequence is under way"
        assert all(s.slot == -1 and not s.full and not s.local for s in self.waiting), "a waiting sequence owns something"

    def _active(self) -> list[Sequence]:
        return sorted((sequence for rank in self.ranks for sequence in rank.active), key=by_arrival)

    def _choose_burst(self, draft: StepDraft, active: list[Sequence], most_steps: int) -> None:
        """Choose how long the next burst is, and how it speculates: without a plan if the drafter would draft for no row."""
        options, rows = self.options, [0] * len(self.ranks)
        can_draft, anyone_waits = options.deterministic, bool(self.waiting)
        for sequence in active:
            anyone_waits = anyone_waits or sequence.low < sequence.target
            if sequence.decodes:
                rows[sequence.rank] += 1
                can_draft = can_draft or sequence.low <= options.drafts_up_to
        draft.active_rows = max(rows)
        draft.plan = options.plan(draft.active_rows) if can_draft else None
        draft.steps = max(1, min(options.short_steps if anyone_waits else options.long_steps, most_steps))
        if any(sequence.guided and sequence.decodes for sequence in active):
            draft.steps = 1

    def _add(self, draft: StepDraft, sequence: Sequence) -> None:
        """Let an active sequence take part in the step, if it has not been preempted meanwhile."""
        if sequence.state is State.PREFILL:
            self._add_piece(draft, sequence)
        elif sequence.state is State.RUNNING and sequence.decodes:
            self._add_row(draft, sequence)

    def _add_row(self, draft: StepDraft, sequence: Sequence) -> None:
        shape = self.options.shape
        start = shape.chunk_start(sequence.low)
        most = draft.steps * (1 + (draft.plan.depth if draft.plan else 0))
        limit = min(sequence.room, sequence.low + 1 if sequence.guided else sequence.high + most, start + (shape.chunk or _ANY))
        if not self._reserve(draft, sequence, start, limit):
            return
        sequence.depart(Flight(draft.number, draft.steps, most, limit))
        full, local = tuple(sequence.full), tuple(sequence.local.get(start, ()))
        draft.rows[sequence.rank].append(BurstRow(sequence.request, sequence.slot, limit, full, local))

    def _add_piece(self, draft: StepDraft, sequence: Sequence) -> None:
        options, rows = self.options, draft.pieces[sequence.rank]
        begin, tokens = sequence.low, sequence.tokens
        end = options.piece_end(begin, sequence.target, scores=sequence.scores)
        length = options.piece_length(end - begin)
        step_length = draft.length or length
        # A rank without a piece of the step's length takes a shorter one; otherwise its row would be padding.
        fits = draft.takes(sequence) and (length == step_length or (length < step_length and not rows))
        fits = fits and not (options.one_piece and any(draft.pieces))
        start = options.shape.chunk_start(end - 1)
        if not fits or len(rows) == options.most_piece_rows(step_length) or not self._reserve(draft, sequence, start, end):
            return
        draft.length, draft.scores = step_length, sequence.scores
        first, last = begin == sequence.hit, end == sequence.target
        sequence.depart(Flight(draft.number, end - begin, end - begin, end))
        sequence.state = State.RUNNING if last else State.PREFILL
        rows.append(
            PieceRow(
                request=sequence.request,
                slot=sequence.slot,
                start=begin,
                tokens=tuple(tokens[begin:end]),
                before=tuple(tokens[:begin]) if first else (),
                first=first,
                last=last,
                following=-1 if last else tokens[end],
                prompt_length=sequence.prompt_length,
                full=tuple(sequence.full),
                local=tuple(sequence.local.get(start, ())),
            )
        )

    def _reserve(self, draft: StepDraft, sequence: Sequence, start: int, end: int) -> bool:
        """Reserve pages as :meth:`DataRank.grow` does, if need be by preemption. False: the sequence sits the step out."""
        rank = self.ranks[sequence.rank]
        while not rank.grow(sequence, start, end):
            newest = rank.active[-1]
            if newest is sequence or any(other < start for other in sequence.local):
                draft.lack_pages.add(rank.number)
                return False
            assert not draft.has(newest), "older sequences are planned first, and admission has reserved a piece's pages"
            self._preempt(draft, rank, newest)
        return True

    def _preempt(self, draft: StepDraft, rank: DataRank, sequence: Sequence) -> None:
        sequence.saved = self.options.deterministic and len(sequence.tokens) > sequence.prompt_length
        shape = self.options.shape
        if sequence.saved:
            full = tuple(sequence.full[: shape.full_pages(sequence.high)])
            local = tuple(sequence.local.get(shape.chunk_start(sequence.low), ()))
            draft.saves.append(Save(sequence.request, sequence.slot, full, local))
        rank.release(sequence, unsure=bool(sequence.flights))
        if not sequence.saved:
            sequence.flights.clear()
        sequence.state = State.PREEMPTED
        self.preemptions += 1
        bisect.insort(self.waiting, sequence, key=by_arrival)

    def _admitted(self, draft: StepDraft) -> Sequence | None:
        """Admit the oldest waiting sequence, if a data rank has room for it; the module says which rank."""
        sequence = self.waiting[0] if self.waiting else None
        if sequence is None or (sequence.saved and sequence.flights):
            return None
        open_ranks = [rank for rank in self.ranks if rank.has_slot and rank.number not in draft.lack_pages]
        hits = {rank.number: 0 if sequence.saved else rank.prefix(sequence) for rank in open_ranks}
        for rank in sorted(open_ranks, key=lambda rank: (-hits[rank.number], -rank.pool.full.available, rank.number)):
            if sequence.saved:
                if rank.readmit(sequence):
                    draft.loads.append(self._load(sequence))
                    break
            elif rank.is_writing(sequence, hits[rank.number]):
                return None
            elif rank.admit(sequence, hits[rank.number]):
                break
        else:
            return None
        return self.waiting.pop(0)

    def _load(self, sequence: Sequence) -> Load:
        shape = self.options.shape
        sequence.saved = False
        full = tuple(sequence.full[: shape.full_pages(sequence.committed)])
        local = tuple(sequence.local.get(shape.chunk_start(sequence.committed), ()))
        return Load(sequence.request, sequence.slot, full, local)

    def _take_in(self, sequence: Sequence, row: PieceRow | BurstRow, result: RowResult) -> None:
        flight = sequence.flights.pop(0)
        if result.failed:
            self._end(sequence, State.FAILED, unsure=True)
            return
        sequence.tokens += result.tokens
        if isinstance(row, PieceRow):
            assert len(result.tokens) == (row.last and not sequence.scores), "only a prefill's last piece draws a token, and no scored one"
            assert not sequence.scores or result.ended == row.last, "a scored sequence ends with its last piece"
            committed = flight.limit
        else:
            committed = sequence.committed + len(result.tokens)
            least = min(flight.limit, sequence.committed + flight.least)
            most = min(flight.limit, sequence.committed + flight.most)
            assert committed <= most and (result.ended or least <= committed), "a burst ran too far, or not far enough"
        sequence.settle(committed)
        if sequence.rank >= 0:
            self.ranks[sequence.rank].settle(sequence)
        if result.ended:
            sequence.flights.clear()  # the devices know that it is done, and write nothing more for it
            self._end(sequence, State.DONE, unsure=False)

    def _end(self, sequence: Sequence, state: State, *, unsure: bool) -> None:
        if sequence.rank >= 0:
            self.ranks[sequence.rank].release(sequence, unsure=unsure)
        else:
            self.waiting.remove(sequence)
        if sequence.saved:
            self._drops.append(sequence.request)
        sequence.flights.clear()
        sequence.state = state
        del self._by_request[sequence.request]

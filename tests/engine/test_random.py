"""The scheduler and the pools under random requests, against a device that checks all that it reads (``fake``)."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from l4jax.engine.options import Options
from l4jax.engine.pages import PageShape
from l4jax.engine.scheduler import Scheduler
from l4jax.engine.sequence import Sequence, State, by_arrival
from l4jax.engine.step import Plan, Results, Step
from tests.engine.fake import FakeDevice, Truth

STEPS = 100_000
PARTS = 5
EVENTS = (
    "hit",
    "hit in a chunk",
    "output computed again",
    "saved",
    "loaded",
    "dropped",
    "failed twice",
    "zeroed",
    "drafts",
    "two deep",
    "idle",
    "scored",
    "scored in pieces",
    "scored again",
    "waits for the other kind",
    "refused",
)
"""What must have happened in each part of the test; otherwise it would show nothing."""
PATIENCE = 4
"""Within this many steps the oldest sequence under way must make progress: it may wait for the results of two steps in flight."""


def drawn_options(dice: random.Random) -> Options:
    page_size, token_ranks = dice.choice([1, 2, 4]), dice.choice([1, 1, 2])
    block = page_size * token_ranks
    chunk = dice.choice([None, None, 2, 4, 5, 6, 8, 8, 12, 16])
    deterministic, drafter = dice.random() < 0.4, dice.random() < 0.6
    slots = dice.choice([1, 2, 3, 4, 6])
    plans: list[tuple[int, Plan | None]] = [(1, None)]
    if drafter:
        deepest = min(3, chunk - 1) if chunk else 3
        some = [Plan("a", dice.randint(1, deepest)), Plan("b", dice.randint(1, deepest)), None]
        plans = [(rows, dice.choice(some)) for rows in sorted({1, *dice.sample(range(2, 6), dice.randint(0, 3))})]
    lengths, rows = (2, 5, 9), (1, 2, 4)
    if deterministic:
        lengths, rows, plans = (block * dice.randint(1, 3),), (dice.randint(1, 3),), plans[:1]
    return Options(
        shape=PageShape(page_size, token_ranks, chunk),
        full_pages=3 + slots * dice.choice([12, 24, 60]) // block,
        local_pages=0 if chunk is None else dice.choice([0, 1, 3, 12]) + -(-chunk // page_size),
        slots=slots,
        row_buckets=(slots,) if deterministic else tuple(sorted({1, (slots + 1) // 2, slots})),
        piece_lengths=lengths,
        piece_rows=rows,
        piece_tokens=dice.choice([4, 12, 30]),
        short_steps=dice.randint(1, 2),
        long_steps=dice.randint(2, 6),
        data_ranks=dice.choice([1, 1, 2]),
        plans=tuple(plans),
        drafter=drafter,
        drafts_up_to=dice.choice([10, 1000]),
        deterministic=deterministic,
        most_scored=lengths[-1] if slots % 3 else lengths[0],
    )


class World:
    """Callers, a scheduler and a device, from the first request to the end of the last; sometimes also another host's scheduler."""

    def __init__(self, dice: random.Random, seen: Counter[str]) -> None:
        self.dice, self.options, self.seen = dice, drawn_options(dice), seen
        self.scheduler, self.device = Scheduler(self.options), FakeDevice(self.options, dice)
        self.host = Scheduler(self.options) if dice.random() < 0.2 else None
        self.host_alive: dict[int, Sequence] = {}
        self.device.fullest = dice.choice([0.0, 0.5, 1.0])
        self.streams = [[dice.randrange(3) for _ in range(60)] for _ in range(2)]
        self.longest_prompt, self.longest_answer = dice.choice([(50, 30), (12, 30), (12, 60)])
        self.fails, self.cancels, self.stops = dice.choice([0, 0.1, 0.3]), dice.choice([0, 0.03, 0.1]), dice.random() < 0.5
        self.scored = dice.choice([0, 0, 0.1, 0.4])
        self.alive: dict[int, Sequence] = {}
        self.begun: set[int] = set()  # scored, and the first piece was dispatched
        self.scores: dict[int, list[int]] = {}  # positions whose scores have come
        self.flying: list[tuple[Step, Step | None, Results]] = []
        self.requests = self.steps = 0
        self.progress: tuple[int, ...] = ()
        self.progress_at = 0

    def add(self) -> None:
        dice, longest = self.dice, self.options.full_pages * self.options.shape.block
        common = dice.choice(self.streams)[: dice.randint(0, min(self.longest_prompt, longest))]
        prompt = common + [dice.randrange(3) for _ in range(dice.randint(0 if common else 1, 9))]
        answer = dice.choice([1, dice.randint(1, 30), dice.randint(1, self.longest_answer)])
        self.requests += 1
        scores = dice.random() < self.scored
        most, scope = (1, None) if scores else (answer, dice.choice([b"", b"", b"", b"a", None]))
        sequence = Sequence(self.requests, prompt, len(prompt) + most, scope, scores)
        if sequence.max_length - 1 > longest:
            with pytest.raises(ValueError, match=r"may need room for \d+ tokens? in the KV cache"):
                self.scheduler.add(sequence)
            self.seen["refused"] += 1
            return
        self.scheduler.add(sequence)
        if self.host is not None:
            self.host_alive[sequence.request] = Sequence(sequence.request, list(prompt), sequence.max_length, sequence.scope, scores)
            self.host.add(self.host_alive[sequence.request])
        fails_at = dice.randrange(sequence.max_length) if dice.random() < self.fails else None
        self.device.truths[sequence.request] = Truth(self.options, sequence, fails_at)
        self.alive[sequence.request] = sequence

    def turn(self) -> None:
        """One iteration of the engine: dispatch steps until two are in flight, then take in the results of the oldest."""
        oldest = min(self.alive.values(), key=by_arrival, default=None)
        preempted = oldest is not None and oldest.state is State.PREEMPTED
        most_steps = self.dice.choice([1, 3, 100])
        while True:
            step, replayed = self.scheduler.next(most_steps), self.host and self.host.next(most_steps)
            assert self.host is None or replayed == step
            if step is None:
                break
            self.check_step(step)
            self.flying.append((step, replayed, self.device.run(step)))
            self.steps += 1
        assert oldest is None or preempted or oldest.state is not State.PREEMPTED, "the oldest was preempted"
        self.check()
        assert self.flying or not self.alive, "nothing to do, and requests wait"
        if self.flying and (len(self.flying) == 2 or self.dice.random() < 0.9 or not self.alive):
            self.finish()

    def finish(self) -> None:
        step, replayed, results = self.flying.pop(0)
        if self.host is not None:
            self.host.finish(replayed, results)
        for row in filter(None, step.pieces):
            if step.prefill.scores and row.first:
                self.scores.pop(row.request, None)
        for news in self.scheduler.finish(step, results):
            sequence, truth = news.sequence, self.device.truths[news.sequence.request]
            assert self.alive[sequence.request] is sequence, "news of a sequence that has ended"
            assert sequence.tokens == truth.tokens[: len(sequence.tokens)]
            assert tuple(sequence.tokens[len(sequence.tokens) - len(news.tokens) :]) == news.tokens
            if sequence.scores:
                row = next(row for row in step.pieces if row and row.request == sequence.request)
                self.scores.setdefault(row.request, []).extend(range(row.start, row.start + len(row.tokens)))
            if sequence.state is State.DONE:
                assert sequence.tokens == truth.tokens
                assert truth.fails_at is None or truth.fails_at >= len(truth.prefix)
                assert not sequence.scores or self.scores.pop(sequence.request) == [*range(sequence.prompt_length)]
                self.seen["scored"] += sequence.scores
            elif sequence.state is State.FAILED:
                assert truth.fails_at is not None
            elif self.stops and news.tokens and sum(news.tokens) % 7 == 6:  # a stop string
                self.cancel(sequence)
            if sequence.state.is_over:
                assert (sequence.slot, sequence.full, sequence.local) == (-1, [], {}), "an ended sequence owns something"
                del self.alive[sequence.request]
            elif sequence.state is State.RUNNING and sequence.committed >= sequence.target:
                self.check_surplus(sequence)

    def cancel(self, sequence: Sequence) -> None:
        self.scheduler.cancel(sequence)
        self.scheduler.cancel(sequence)
        assert sequence.state is State.CANCELLED
        if self.host is not None:
            self.host.cancel(self.host_alive[sequence.request])

    def check_surplus(self, sequence: Sequence) -> None:
        """After results are taken in, a sequence has the pages that its tokens and the step in flight may need, and no others."""
        bound, shape = sequence.committed, self.options.shape
        for step, _, _ in self.flying:
            for row in filter(None, step.rows):
                if row.request == sequence.request:
                    bound = min(row.limit, bound + step.burst.steps * (1 + (step.burst.plan.depth if step.burst.plan else 0)))
        assert len(sequence.full) == -(-bound // shape.block), "a surplus was not returned"
        for start, table in sequence.local.items():
            needed = max(0, min(bound, start + shape.chunk) - start)
            assert len(table) == -(-needed // shape.page_size), "a local surplus was not returned"

    def check_step(self, step: Step) -> None:
        options, shape = self.options, self.options.shape
        prefill, burst = step.pieces, step.rows
        rows = [*filter(None, prefill), *filter(None, burst)]
        assert len({row.slot for row in rows}) == len(rows)
        for rows_of_kind in (prefill, burst):
            own = len(rows_of_kind) // options.data_ranks
            assert all(row is None or row.slot // options.slots == i // own for i, row in enumerate(rows_of_kind))
        self.seen["saved"] += len(step.saves)
        self.seen["dropped"] += len(step.drops)
        self.seen["loaded"] += len(step.loads)
        self.seen["zeroed"] += len(step.zero_full)
        for row in filter(None, prefill):
            self.seen["hit"] += row.first and row.start > 0
            self.seen["hit in a chunk"] += row.first and shape.chunk is not None and row.start % shape.chunk > 0
            self.seen["output computed again"] += row.start + len(row.tokens) > row.prompt_length
            if step.prefill.scores:
                self.seen["scored in pieces"] += row.start > 0
                self.seen["scored again"] += row.first and row.request in self.begun
                self.begun.add(row.request)
        if step.prefill:
            held_up = [s for s in self.alive.values() if s.state is State.PREFILL and s.scores != step.prefill.scores]
            self.seen["waits for the other kind"] += bool(held_up)
            assert all(s.flights[-1:] == [] or s.flights[-1].step != step.number for s in held_up)
        for row in filter(None, burst):
            self.seen["drafts"] += step.burst.plan is not None
            self.seen["failed twice"] += self.device.slots[row.slot].failed
            self.seen["two deep"] += len(self.alive[row.request].flights) == 2
            self.seen["idle"] += self.device.slots[row.slot].length == row.limit
        for row in rows:
            sequence = self.alive[row.request]  # fails for one that has ended
            assert sequence.slot == row.slot
            assert not sequence.scores or (row in prefill and step.prefill.scores), "a scored sequence decodes"
            pool = self.scheduler.ranks[row.slot // options.slots].pool
            if sequence.scores:
                assert not any(pool.full._key[page] for page in row.full), "scored pages are in the prefix cache"
                assert not any(pool.local._key[page] for page in row.local), "scored local pages are in the prefix cache"
            begin, end = sequence.committed, sequence.high
            assert len(row.full) * shape.block >= end
            written = row.full[begin // shape.block : -(-end // shape.block)]
            assert all(pool.full.references(page) == 1 for page in written), "a shared page would be written"
            if shape.chunk:
                start = (end - 1) // shape.chunk * shape.chunk
                assert len(row.local) * shape.page_size >= end - start
                written = row.local[max(begin - start, 0) // shape.page_size : -(-(end - start) // shape.page_size)]
                assert all(pool.local.references(page) == 1 for page in written), "a shared local page would be written"
        if options.deterministic:
            assert not prefill or step.prefill.length == options.piece_lengths[0]
            assert not prefill or len(prefill) == options.data_ranks * options.piece_rows[0]
            assert not burst or (step.burst.plan, len(burst)) == (options.plans[0][1], options.data_ranks * options.slots)
        elif step.prefill and len(prefill) > options.data_ranks * options.piece_rows[0]:
            assert step.prefill.length * len(prefill) <= options.piece_tokens * options.data_ranks

    def check(self) -> None:
        self.scheduler.check()
        oldest = min((sequence for rank in self.scheduler.ranks for sequence in rank.active), key=by_arrival, default=None)
        progress = (oldest.request, oldest.committed) if oldest else ()
        if progress != self.progress:
            self.progress, self.progress_at = progress, self.steps
        assert not oldest or self.steps - self.progress_at <= PATIENCE, "the oldest does not get on"

    def run(self, steps: int) -> None:
        """Requests come for this many steps; then all of them end."""
        left = 0
        while self.steps < steps or not self.scheduler.idle or self.flying:
            while self.steps < steps and (self.dice.random() < 0.4 or not self.alive):
                self.add()
                if self.requests > 50 * steps:  # all are refused: the pool is too small for any
                    return
            if self.dice.random() < self.cancels and self.alive:
                saved = [request for request, sequence in self.alive.items() if sequence.saved]
                self.cancel(self.alive.pop(self.dice.choice(saved or list(self.alive))))
            self.turn()
            left = left if self.steps > steps else sum(sequence.max_length for sequence in self.alive.values())
            assert self.steps <= steps + 3 * left + 10, "requests do not end"
        assert not self.device.host, "a saved copy is left"
        assert self.host is None or self.host.digest() == self.scheduler.digest()
        for rank in self.scheduler.ranks:
            assert rank.pool.full.available == self.options.full_pages, "pages are lost"
            assert rank.pool.local.available == self.options.local_pages, "local pages are lost"


@pytest.mark.parametrize("part", range(PARTS))
def test_random_requests_get_what_they_get_alone(part: int) -> None:
    dice, seen, steps = random.Random(part), Counter[str](), 0
    while steps < STEPS // PARTS:
        world = World(dice, seen)
        world.run(dice.choice([20, 100, 200]))
        steps += world.steps
    assert [event for event in EVENTS if not seen[event]] == []

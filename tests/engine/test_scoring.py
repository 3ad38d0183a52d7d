"""Sequences that are scored and not continued: their pieces, and how they end, written out."""

from __future__ import annotations

import dataclasses

import pytest

from l4jax.engine.options import Options
from l4jax.engine.scheduler import Scheduler
from l4jax.engine.sequence import Sequence, State
from l4jax.engine.step import News, Results, RowResult
from tests.engine.calls import CHUNKED, DRAFTED, SMALL, added, finish, output, prefilled, told


def scored(scheduler: Scheduler, request: int, prompt: range) -> Sequence:
    return added(scheduler, request, prompt, 1, scope=None, scores=True)


def test_from_its_first_piece_to_its_end():
    scheduler = Scheduler(SMALL)
    sequence = scored(scheduler, 1, range(10))
    one, two = scheduler.next(), scheduler.next()
    assert told(one) == ["piece 1 in 0: 0-8 of 8 (0, 1, 2) () first scored"]
    assert told(two) == ["piece 1 in 0: 8-10 of 4 (0, 1, 2) () last scored"]
    assert [(step.pieces[0].following, step.pieces[0].before) for step in (one, two)] == [(8, ()), (-1, ())]
    assert finish(scheduler, one) == [News(sequence, ())]
    assert (sequence.state, scheduler.next()) == (State.RUNNING, None)  # it never decodes
    assert finish(scheduler, two) == [News(sequence, ())]
    assert (sequence.state, sequence.slot, sequence.full, output(sequence)) == (State.DONE, -1, [], [])
    assert scheduler.idle and scheduler.ranks[0].pool.full.available == SMALL.full_pages
    scheduler.check()


@pytest.mark.parametrize("options", [SMALL, CHUNKED, DRAFTED])
def test_it_neither_uses_nor_leaves_a_prefix(options: Options):
    scheduler = Scheduler(options)
    prompt = range(13)
    scheduler.cancel(prefilled(scheduler, 1, prompt))
    named = dict(scheduler.ranks[0].pool.full._by_key)
    sequence = scored(scheduler, 2, prompt)
    step = scheduler.next()
    assert [(row.start, row.first) for row in step.pieces] == [(0, True)]
    finish(scheduler, step)
    while not sequence.state.is_over:
        finish(scheduler, scheduler.next())
    assert scheduler.ranks[0].pool.full._by_key == named
    scheduler = Scheduler(options)
    scored(scheduler, 1, prompt)
    while not scheduler.idle:
        finish(scheduler, scheduler.next())
    added(scheduler, 2, prompt)
    assert scheduler.next().pieces[0].start == 0


def test_nobody_waits_for_the_prefix_that_it_writes():
    scheduler = Scheduler(SMALL)
    scored(scheduler, 1, range(16))
    other = added(scheduler, 2, range(16))
    scheduler.next()
    assert other.state is State.PREFILL


def test_the_oldest_decides_the_kind_of_the_pieces_and_the_others_follow():
    scheduler = Scheduler(dataclasses.replace(SMALL, slots=4, row_buckets=(4,), piece_rows=(4,), piece_tokens=32, full_pages=64))
    scored(scheduler, 1, range(16))
    added(scheduler, 2, range(100, 116))
    scored(scheduler, 3, range(200, 216))
    added(scheduler, 4, range(300, 316))
    found = []
    while (step := scheduler.next(1)).prefill:
        found.append((step.prefill.scores, [row.request for row in step.pieces if row]))
        finish(scheduler, step)
    assert found == [(True, [1, 3]), (True, [1, 3]), (False, [2, 4]), (False, [2, 4])]


@pytest.mark.parametrize("oldest", [True, False])
def test_newer_ones_of_the_other_kind_do_not_starve_it(oldest: bool):
    """There is always a newer sequence of the other kind, scored or not, but the oldest goes first."""

    def add(request: int, *, scores: bool) -> Sequence:
        prompt = range(100 * request, 100 * request + 16)
        return scored(scheduler, request, prompt) if scores else added(scheduler, request, prompt)

    scheduler = Scheduler(dataclasses.replace(SMALL, slots=6, row_buckets=(6,), full_pages=64))
    add(1, scores=not oldest)
    finish(scheduler, scheduler.next(1))
    sequence = add(2, scores=oldest)
    for request in range(3, 6):
        add(request, scores=not oldest)
        if sequence.committed < 16:
            finish(scheduler, scheduler.next(1))
    assert sequence.committed == 16


def test_a_data_rank_with_the_other_kind_waits_and_decodes_meanwhile():
    scheduler = Scheduler(dataclasses.replace(SMALL, data_ranks=2))
    prefilled(scheduler, 1, range(4), 20)
    scored(scheduler, 2, range(100, 112))
    added(scheduler, 3, range(200, 204), 20)
    kinds = [(step.prefill.scores, *step.requests) for step in (scheduler.next(1), scheduler.next(1))]
    assert kinds == [(True, [None, 2], [1, None]), (True, [None, 2], [1, None])]
    assert scheduler.ranks[0].active[1].request == 3  # it has its slot


def test_with_a_plan_of_speculation_it_needs_no_pages_for_a_burst():
    scheduler = Scheduler(dataclasses.replace(DRAFTED, full_pages=4))
    scored(scheduler, 1, range(16))
    assert len(scheduler.next().pieces[0].full) == 4


PINNED = {"row_buckets": (2,), "piece_rows": (1,), "deterministic": True}


def contested(**options: object) -> tuple[Scheduler, Sequence, Sequence]:
    """Two sequences. The newer is scored, has one of three pieces left, and has a page that the older needs; nothing is in flight."""
    scheduler = Scheduler(dataclasses.replace(SMALL, full_pages=5, piece_lengths=(4,), long_steps=1, **options))
    old = prefilled(scheduler, 1, range(6), 6)
    new = scored(scheduler, 2, range(100, 112))
    for _ in range(2):
        finish(scheduler, scheduler.next())
    assert (old.committed, new.committed, old.full, new.full) == (8, 8, [0, 1], [2, 3, 4])
    return scheduler, old, new


@pytest.mark.parametrize("options", [{}, PINNED])
def test_after_a_preemption_its_pieces_come_again_from_the_start(options: dict[str, object]):
    scheduler, old, new = contested(**options)
    step = scheduler.next()
    assert (step.prefill, step.saves, new.state, new.full) == (None, (), State.PREEMPTED, [])
    finish(scheduler, step, ended=(old.request,))
    found = []
    while not scheduler.idle:
        step = scheduler.next()
        found += [(row.start, row.first, row.last) for row in step.pieces]
        finish(scheduler, step)
    assert found == [(0, True, False), (4, False, False), (8, False, True)]
    assert new.state is State.DONE


def test_results_of_pieces_before_a_preemption_do_not_count():
    scheduler = Scheduler(dataclasses.replace(SMALL, full_pages=4, long_steps=1, piece_lengths=(8,)))
    old, new = added(scheduler, 1, range(7), 6), scored(scheduler, 2, range(100, 108))
    finish(scheduler, scheduler.next())
    last = scheduler.next()
    assert told(last) == ["piece 2 in 1: 0-8 of 8 (2, 3) () first last scored", "1 rounds 1 in 0: before 8 (0, 1) ()"]
    assert told(scheduler.next()) == ["zero ((0, 3), (0, 2))", "1 rounds 1 in 0: before 9 (0, 1, 2) ()"]
    assert [news.sequence for news in finish(scheduler, last)] == [old]
    assert (new.state, new.committed) == (State.PREEMPTED, 0)


def test_a_failed_piece_ends_it_and_its_pages_are_zeroed():
    scheduler = Scheduler(SMALL)
    bad, good = scored(scheduler, 1, range(10)), scored(scheduler, 2, range(100, 108))
    one, two = scheduler.next(), scheduler.next()
    assert finish(scheduler, one, failed=(1,)) == [News(bad, ()), News(good, ())]
    assert (bad.state, good.state, bad.slot) == (State.FAILED, State.DONE, -1)
    assert finish(scheduler, two) == []
    added(scheduler, 3, range(200, 204))
    assert told(scheduler.next())[0] == "zero ((0, 2), (0, 1), (0, 0))"


def test_it_may_be_cancelled_while_it_waits_and_while_its_last_piece_runs():
    scheduler = Scheduler(dataclasses.replace(SMALL, slots=1, row_buckets=(1,)))
    running, waiting = scored(scheduler, 1, range(4)), scored(scheduler, 2, range(4))
    step = scheduler.next()
    scheduler.cancel(waiting)
    scheduler.cancel(running)
    assert scheduler.idle and finish(scheduler, step) == []
    scheduler.check()


@pytest.mark.parametrize(
    ("result", "line"),
    [
        (RowResult((7,), ended=True), "only a prefill's last piece draws a token, and no scored one"),
        (RowResult(), "a scored sequence ends with its last piece"),
    ],
)
def test_results_that_a_scored_piece_cannot_have_are_noticed(result: RowResult, line: str):
    scheduler = Scheduler(SMALL)
    scored(scheduler, 1, range(4))
    step = scheduler.next()
    with pytest.raises(AssertionError, match=line):
        scheduler.finish(step, Results((result,), ()))


def test_one_that_can_never_fit_is_not_told_to_lower_max_tokens():
    with pytest.raises(
        ValueError, match=r"^a prompt of 70 tokens may need room for 70 tokens .* pages of 4\); shorten the prompt or load with a"
    ):
        scored(Scheduler(SMALL), 1, range(70))

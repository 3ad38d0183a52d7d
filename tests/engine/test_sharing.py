"""Prefixes that requests share, and chunks: which pages a row reads and writes, written out."""

from __future__ import annotations

import dataclasses

from l4jax.engine.scheduler import Scheduler
from l4jax.engine.step import Plan
from tests.engine.calls import CHUNKED, DRAFTED, SMALL, added, finish, prefilled, told


def test_a_prefix_is_found_again_but_never_the_last_token():
    scheduler = Scheduler(SMALL)
    scheduler.cancel(prefilled(scheduler, 1, range(12)))
    added(scheduler, 2, range(12))
    step = scheduler.next()
    assert told(step) == ["piece 2 in 0: 8-12 of 4 (0, 1, 3, 4) () first last"]
    finish(scheduler, step)
    added(scheduler, 3, range(13))
    assert told(scheduler.next())[0] == "piece 3 in 1: 12-13 of 4 (0, 1, 2, 5) () first last"
    scheduler.check()


def test_another_scope_or_none_shares_nothing():
    scheduler = Scheduler(SMALL)
    scheduler.cancel(prefilled(scheduler, 1, range(8), scope=None))
    for request, scope in ((2, b""), (3, b"a"), (4, None)):
        sequence = added(scheduler, request, range(9), scope=scope)
        step = scheduler.next()
        assert step.prefill.rows[0].start == 0
        finish(scheduler, step)
        scheduler.cancel(sequence)


def test_a_hit_inside_a_chunk_shares_its_local_pages_and_later_tokens_get_fresh_ones():
    scheduler = Scheduler(CHUNKED)
    first = prefilled(scheduler, 1, range(5))
    assert (first.full, first.local) == ([0, 1], {0: [0, 1]})
    added(scheduler, 2, range(6))
    step = scheduler.next()
    assert told(step)[0] == "piece 2 in 1: 4-6 of 4 (0, 2, 3) (0, 2) first last"
    assert first.local == {0: [0, 1]}
    scheduler.check()


def test_each_chunk_that_is_left_stays_in_the_cache():
    scheduler = Scheduler(CHUNKED)
    scheduler.cancel(prefilled(scheduler, 1, range(16)))
    for length in (16, 9, 8, 5, 4):
        sequence = added(scheduler, length, range(length))
        step = scheduler.next()
        # At a chunk's boundary no local page is shared; inside a chunk those from its beginning on are.
        assert (step.prefill.rows[0].start, step.prefill.rows[0].first) == ((length - 1) // 4 * 4, True)
        finish(scheduler, step)
        scheduler.cancel(sequence)
    scheduler.check()


def test_a_burst_ends_with_its_chunk_and_the_next_has_fresh_local_pages():
    scheduler = Scheduler(CHUNKED)
    sequence = prefilled(scheduler, 1, range(6), 12)
    one, two = scheduler.next(), scheduler.next()
    assert told(one) == ["3 rounds 1 in 0: before 8 (0, 1) (0, 1)"]
    assert told(two) == ["3 rounds 1 in 0: before 11 (0, 1, 2) (2,)"]
    finish(scheduler, one, tokens=2)
    assert sequence.local == {8: [2]}
    scheduler.check()


def test_a_row_that_may_be_at_its_chunks_end_gets_one_more_burst_in_it():
    scheduler = Scheduler(dataclasses.replace(CHUNKED, plans=((1, Plan("chain:2", 2)),), drafter=True, long_steps=1))
    prefilled(scheduler, 1, range(5), 12)
    one, two = scheduler.next(), scheduler.next()
    assert told(one) == ["1 rounds chain:2 1 in 0: before 8 (0, 1) (0, 1)"]
    assert told(two) == ["1 rounds chain:2 1 in 0: before 8 (0, 1) (0, 1)"]  # it has 6 to 8 tokens
    finish(scheduler, one, tokens=3)
    assert told(scheduler.next()) == ["1 rounds chain:2 1 in 0: before 11 (0, 1, 2) (2,)"]
    finish(scheduler, two, tokens=0)


def test_a_piece_runs_over_whole_chunks_only_from_a_boundary():
    scheduler = Scheduler(dataclasses.replace(CHUNKED, piece_lengths=(4, 12)))
    added(scheduler, 1, range(30))
    one, two = scheduler.next(), scheduler.next()
    assert told(one) == ["piece 1 in 0: 0-12 of 12 (0, 1, 2, 3, 4, 5, 6, 7, 8) (0,) first"]
    assert told(two) == ["piece 1 in 0: 12-16 of 4 (0, 1, 2, 3, 4, 5, 6, 7, 8) (0, 1)"]
    finish(scheduler, one)
    assert told(scheduler.next()) == ["piece 1 in 0: 16-28 of 12 (0, 1, 2, 3, 4, 5, 6, 7, 8) (2,)"]


def test_a_request_waits_for_the_prefix_that_another_writes():
    scheduler = Scheduler(SMALL)
    added(scheduler, 1, range(16))
    added(scheduler, 2, [*range(12), 99])
    one, two = scheduler.next(), scheduler.next()
    assert [step.prefill.rows[0].request for step in (one, two)] == [1, 1]
    finish(scheduler, one)
    three = scheduler.next()
    assert told(three) == ["1 rounds 1 in 0: before 17 (0, 1, 2, 3, 4) ()"]
    finish(scheduler, two)
    assert told(scheduler.next())[0] == "piece 2 in 1: 12-13 of 4 (0, 1, 2, 5) () first last"


def test_a_request_goes_on_alone_when_the_writer_is_gone():
    scheduler = Scheduler(SMALL)
    writer = added(scheduler, 1, range(16))
    added(scheduler, 2, range(13))
    scheduler.next()
    scheduler.cancel(writer)
    assert told(scheduler.next()) == ["zero ((0, 1), (0, 0))", "piece 2 in 0: 0-8 of 8 (0, 1, 2, 3) () first"]


def test_nobody_waits_for_a_writer_that_cannot_help():
    scheduler = Scheduler(SMALL)
    added(scheduler, 1, range(7))
    added(scheduler, 2, [*range(3), 99, 4, 5, 6])  # differs in the first page
    assert [row.request for row in scheduler.next().prefill.rows] == [1, 2]
    scheduler = Scheduler(SMALL)
    added(scheduler, 1, range(8))
    added(scheduler, 2, range(4))  # would have to compute its last token anyway, in the same page
    assert scheduler.next().prefill.rows[0].request == 1
    assert scheduler.next().prefill.rows[0].request == 2


def test_a_drafters_last_entry_is_anothers_only_if_the_token_after_it_is_the_same():
    for following, start in ((8, 8), (99, 4)):
        scheduler = Scheduler(DRAFTED)
        scheduler.cancel(prefilled(scheduler, 1, range(12)))
        added(scheduler, 2, [*range(8), following, 9])
        assert scheduler.next().prefill.rows[0].start == start


def test_a_row_is_drafted_for_again_after_a_burst_with_the_plan_off_and_leaves_its_pages_in_the_cache():
    scheduler = Scheduler(dataclasses.replace(DRAFTED, plans=((1, None), (2, Plan("chain:2", 2)))))
    one = prefilled(scheduler, 1, range(4), 20)
    step = scheduler.next()
    assert told(step) == ["3 rounds 1 in 0: before 7 (0, 1) ()"]
    finish(scheduler, step)
    two = added(scheduler, 2, range(100, 104))
    finish(scheduler, scheduler.next(1), tokens=1)
    step = scheduler.next(1)
    assert told(step) == ["1 rounds chain:2 1 in 0: before 11 (0, 1, 3) ()", "1 rounds chain:2 2 in 1: before 7 (2, 4) ()"]
    finish(scheduler, step, tokens=1)
    # Its second page has the drafter's entries too, although most of its tokens were added without a plan.
    scheduler.cancel(two)
    added(scheduler, 3, one.tokens)
    assert scheduler.next().prefill.rows[0].start == 8


def test_the_plan_comes_back_when_fewer_rows_are_active():
    scheduler = Scheduler(DRAFTED)
    prefilled(scheduler, 1, range(4), 20)
    two = prefilled(scheduler, 2, range(100, 104), 20)
    step = scheduler.next(1)
    assert step.burst.plan is None
    finish(scheduler, step)
    scheduler.cancel(two)
    assert told(scheduler.next(1)) == ["1 rounds chain:2 1 in 0: before 9 (0, 1, 3) ()"]


def test_a_first_piece_brings_the_tokens_of_its_hit_and_later_ones_none():
    scheduler = Scheduler(SMALL)
    scheduler.cancel(prefilled(scheduler, 1, range(8)))
    added(scheduler, 2, [*range(8), *range(50, 60)])
    one, two = scheduler.next(), scheduler.next()
    assert [(row.start, row.first, row.before) for step in (one, two) for row in step.pieces] == [
        (8, True, tuple(range(8))),
        (16, False, ()),
    ]


def test_a_local_page_short_of_a_whole_chunk_keeps_a_request_out():
    for most, pages in ((6, None), (2, (2,))):
        scheduler = Scheduler(dataclasses.replace(CHUNKED, local_pages=3))
        prefilled(scheduler, 1, range(6))
        added(scheduler, 2, range(100, 102), most)  # 7 positions of its chunk, in two pages, or 3 in one; one is left
        assert [row.local for row in scheduler.next().pieces] == ([pages] if pages else [])
    # The pages of its hit count as its own, though they leave fewer for others.
    scheduler = Scheduler(dataclasses.replace(CHUNKED, local_pages=2))
    scheduler.cancel(prefilled(scheduler, 1, range(4)))
    added(scheduler, 2, range(6))
    assert [(row.start, row.local) for row in scheduler.next().pieces] == [(4, (0, 1))]

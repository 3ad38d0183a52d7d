"""Which sequence is preempted and which waits when pages run out, and how sequences end, written out."""

from __future__ import annotations

import dataclasses

from l4jax.engine.scheduler import Scheduler
from l4jax.engine.sequence import Sequence, State
from l4jax.engine.step import Load, News, Save, Step
from tests.engine.calls import CHUNKED, SMALL, added, finish, output, prefilled, told


def crowded(**options: object) -> tuple[Scheduler, Sequence, Sequence]:
    """Two sequences, the older of which needs a page that the newer has; nothing is in flight."""
    scheduler = Scheduler(dataclasses.replace(SMALL, full_pages=4, long_steps=1, **options))
    old, new = added(scheduler, 1, range(7)), added(scheduler, 2, range(100, 105))
    while len(old.tokens) < 9:
        finish(scheduler, scheduler.next())
    assert (old.full, old.committed, new.full, new.committed) == ([0, 1], 8, [2, 3], 6)
    return scheduler, old, new


def test_the_newest_is_preempted_and_computes_its_output_again():
    scheduler, _, new = crowded()
    step = scheduler.next()
    assert told(step) == ["1 rounds 1 in 0: before 9 (0, 1, 3) ()", "-"]
    assert (new.state, new.full, new.slot) == (State.PREEMPTED, [], -1)
    finish(scheduler, step, ended=(1,))
    step = scheduler.next()
    # Its first page is still in the cache. Its prompt is now its 5 tokens and the 2 that it got.
    assert told(step) == ["piece 2 in 0: 4-7 of 4 (2, 3) () first last"]
    row = step.prefill.rows[0]
    assert (row.before, row.tokens, row.prompt_length) == ((100, 101, 102, 103), (104, 7, 7), 5)
    finish(scheduler, step)
    assert output(new) == [7, 7, 7]


def contested(**options: object) -> tuple[Scheduler, Sequence, Sequence, Step]:
    """The same two sequences as in :func:`crowded`, with one burst still in flight."""
    scheduler = Scheduler(dataclasses.replace(SMALL, full_pages=4, long_steps=1, **options))
    old, new = added(scheduler, 1, range(7)), added(scheduler, 2, range(100, 105))
    finish(scheduler, scheduler.next())
    one = scheduler.next()
    assert told(one) == ["1 rounds 1 in 0: before 8 (0, 1) ()", "1 rounds 2 in 1: before 6 (2, 3) ()"]
    return scheduler, old, new, one


def test_what_a_preempted_sequence_has_in_flight_is_dropped_and_what_it_may_write_is_zeroed():
    scheduler, old, new, one = contested()
    assert told(scheduler.next()) == ["zero ((0, 3),)", "1 rounds 1 in 0: before 9 (0, 1, 3) ()", "-"]
    assert finish(scheduler, one) == [News(old, (7,))]
    assert (new.state, output(new)) == (State.PREEMPTED, [7])


PINNED = {"row_buckets": (2,), "piece_lengths": (8,), "piece_rows": (2,), "deterministic": True}


def test_in_deterministic_mode_a_preempted_sequence_waits_in_host_memory():
    scheduler, _, new = crowded(**PINNED)
    one = scheduler.next()
    assert one.saves == (Save(2, 1, (2, 3), ()),)
    assert told(one) == ["save 2 of slot 1: (2, 3) ()", "1 rounds 1 in 0: before 9 (0, 1, 2) ()", "-"]
    finish(scheduler, one, ended=(1,))
    two = scheduler.next()
    assert two.loads == (Load(2, 0, (0, 1), ()),)
    assert told(two) == ["load 2 to slot 0: (0, 1) ()"]
    assert told(scheduler.next()) == ["1 rounds 2 in 0: before 7 (0, 1) ()", "-"]
    assert (new.state, output(new)) == (State.RUNNING, [7, 7])


def test_a_saved_sequence_gets_its_last_results_and_comes_back_after_them():
    scheduler, old, new, one = contested(**PINNED)
    two = scheduler.next()
    assert told(two) == ["save 2 of slot 1: (2, 3) ()", "zero ((0, 3),)", "1 rounds 1 in 0: before 9 (0, 1, 2) ()", "-"]
    scheduler.cancel(old)
    assert finish(scheduler, one) == [News(new, (7,))]
    assert (new.state, output(new)) == (State.PREEMPTED, [7, 7])
    three = scheduler.next()
    assert three.loads and len(three.loads[0].full) == 2  # the page of positions 4 to 8 has its 6th token


def test_a_saved_sequence_may_end_while_it_waits():
    scheduler, _, new, one = contested(**PINNED)
    scheduler.next()
    finish(scheduler, one, ended=(2,))
    assert new.state is State.DONE
    assert scheduler.next().drops == (2,)
    scheduler.check()


def test_a_saved_copy_is_dropped_once_when_its_request_ends_and_before_the_scheduler_is_idle():
    scheduler, old, new = crowded(**PINNED)
    assert scheduler.next().saves == (Save(2, 1, (2, 3), ()),)
    scheduler.cancel(old)
    scheduler.cancel(new)
    assert not scheduler.idle
    assert told(scheduler.next())[0] == "drop 2"
    assert scheduler.idle and scheduler.next() is None


def test_a_copy_that_was_loaded_is_not_dropped():
    scheduler, old, new = crowded(**PINNED)
    finish(scheduler, scheduler.next(), ended=(1,))
    assert scheduler.next().loads
    scheduler.cancel(new)
    assert old.state is State.DONE and scheduler.idle


def test_a_sequence_without_output_is_recomputed_in_deterministic_mode_too():
    scheduler = Scheduler(dataclasses.replace(SMALL, full_pages=4, long_steps=1, **{**PINNED, "piece_lengths": (4,), "piece_rows": (1,)}))
    prefilled(scheduler, 1, range(7))
    new = added(scheduler, 2, range(100, 106))
    finish(scheduler, scheduler.next())
    assert (new.state, new.committed) == (State.PREFILL, 4)
    step = scheduler.next()
    assert (step.saves, new.state) == ((), State.PREEMPTED)


def test_the_newest_sits_out_if_it_lacks_pages_and_nobody_is_admitted_before_it():
    scheduler = Scheduler(dataclasses.replace(SMALL, full_pages=11, short_steps=8, long_steps=8, slots=3, row_buckets=(3,)))
    old, new = added(scheduler, 1, range(7), 16), added(scheduler, 2, range(100, 105), 17)
    finish(scheduler, scheduler.next())
    finish(scheduler, scheduler.next())
    assert (len(old.full), old.committed, len(new.full), new.committed) == (4, 15, 4, 13)
    small = added(scheduler, 3, range(200, 201), 1)
    step = scheduler.next()
    assert told(step)[0].startswith("8 rounds 1 in 0: before 22") and told(step)[1:] == ["-", "-"]
    assert (new.state, len(new.full), small.state, scheduler.ranks[0].pool.full.available) == (State.RUNNING, 4, State.WAITING, 1)


def test_a_sequence_that_gets_its_chunks_pages_back_waits_for_them_instead_of_preempting():
    scheduler = Scheduler(dataclasses.replace(CHUNKED, local_pages=4))
    old, new = added(scheduler, 1, range(7)), added(scheduler, 2, range(100, 106))
    finish(scheduler, scheduler.next())
    one, two = scheduler.next(), scheduler.next()
    assert told(one) == ["3 rounds 1 in 0: before 8 (0, 1) (0, 1)", "3 rounds 2 in 1: before 8 (3, 4) (2, 3)"]
    assert two is None
    finish(scheduler, one)
    assert told(scheduler.next())[0] == "3 rounds 1 in 0: before 11 (0, 1, 5) (1,)"
    assert (old.state, new.state) == (State.RUNNING, State.RUNNING)


def test_a_piece_that_sits_out_does_not_decide_the_length_of_the_others():
    scheduler = Scheduler(dataclasses.replace(CHUNKED, local_pages=3))
    added(scheduler, 1, range(16))
    added(scheduler, 2, range(100, 103), 1)
    assert told(scheduler.next()) == ["piece 1 in 0: 0-8 of 8 (0, 1, 2, 3, 4) (0, 1) first"]
    # The first lacks a page for its second chunk until the results are there.
    assert told(scheduler.next()) == ["piece 2 in 1: 0-3 of 4 (5,) (2,) first last"]


def test_a_sequence_that_lacks_pages_holds_up_its_own_rank_only():
    scheduler = Scheduler(dataclasses.replace(CHUNKED, data_ranks=2, local_pages=2))
    added(scheduler, 1, range(7), 20)
    added(scheduler, 2, range(100, 102), 3)
    finish(scheduler, scheduler.next())
    assert told(scheduler.next()) == ["3 rounds 1 in 0: before 8 (0, 1) (0, 1)", "3 rounds 2 in 2: before 4 (0,) (0,)"]
    added(scheduler, 3, range(200, 201), 1)
    assert told(scheduler.next()) == ["-", "piece 3 in 3: 0-1 of 4 (1,) (1,) first last"]


def test_a_failed_row_ends_alone_and_its_pages_are_zeroed_by_the_next_step():
    scheduler = Scheduler(CHUNKED)
    bad, good = added(scheduler, 1, range(6)), added(scheduler, 2, range(100, 106))
    finish(scheduler, scheduler.next())
    one, two = scheduler.next(), scheduler.next()
    assert told(one)[0] == "3 rounds 1 in 0: before 8 (0, 1) (0, 1)"
    assert told(two)[0] == "3 rounds 1 in 0: before 11 (0, 1, 5) (4,)"
    assert finish(scheduler, one, failed=(1,)) == [News(bad, ()), News(good, (7, 7))]
    assert (bad.state, good.state, output(bad)) == (State.FAILED, State.RUNNING, [7])
    three = scheduler.next()
    # Not the first page: the results of the prefill have verified it, and it is in the cache.
    assert told(three)[:2] == ["zero ((0, 5), (0, 1))", "zero ((0, 1), (0, 4))"]
    assert [news.sequence for news in finish(scheduler, two)] == [good]
    added(scheduler, 3, range(6))
    assert scheduler.next().prefill.rows[0].start == 4
    scheduler.check()


def test_cancelling_takes_effect_at_once_and_twice_does_no_harm():
    scheduler = Scheduler(SMALL)
    running, waiting = prefilled(scheduler, 1, range(4)), [added(scheduler, request, range(9)) for request in (2, 3)]
    step = scheduler.next()
    for sequence in (running, *waiting, running):
        scheduler.cancel(sequence)
    assert scheduler.idle
    assert finish(scheduler, step) == []
    scheduler.check()


def test_the_largest_request_that_fits_is_served():
    scheduler = Scheduler(dataclasses.replace(CHUNKED, local_pages=2))
    sequence = added(scheduler, 1, range(60), 5)
    for _ in range(100):
        if (step := scheduler.next()) is None:
            break
        finish(scheduler, step)
    assert len(sequence.tokens) == 65

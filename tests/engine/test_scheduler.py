"""Each rule of the scheduler by itself: what is called, and the steps that are expected, written out."""

from __future__ import annotations

import dataclasses

import pytest

from l4jax.engine.options import Options
from l4jax.engine.pages import PageShape
from l4jax.engine.scheduler import Scheduler
from l4jax.engine.sequence import Sequence, State
from l4jax.engine.step import BurstRow, Load, News, PieceRow, Plan, Results, RowResult, Save, Step

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


def told(step: Step | None) -> list[str]:
    """A step in words: each row's request, slot, tokens and pages."""
    if step is None:
        return []
    words = [f"save {s.request} of slot {s.slot}: {s.full} {s.local}" for s in step.saves]
    words += [f"zero {pages}" for pages in (step.zero_full, step.zero_local) if pages]
    words += [f"load {s.request} to slot {s.slot}: {s.full} {s.local}" for s in step.loads]
    for row in step.prefill.rows if step.prefill else ():
        words.append("-")
        if row is not None:
            marks = " first" * row.first + " last" * row.last
            place = f"{row.start}-{row.start + len(row.tokens)} of {step.prefill.length}"
            words[-1] = f"piece {row.request} in {row.slot}: {place} {row.full} {row.local}{marks}"
    for row in step.burst.rows if step.burst else ():
        words.append("-")
        if row is not None:
            how = "" if step.burst.plan is None else f" {step.burst.plan.name}" if row.drafts else f" {step.burst.plan.name} without drafts"
            words[-1] = f"{step.burst.steps} rounds{how} {row.request} in {row.slot}: before {row.limit} {row.full} {row.local}"
    return words


def finish(
    scheduler: Scheduler, step: Step, *, ended: tuple[int, ...] = (), failed: tuple[int, ...] = (), tokens: int | None = None
) -> list[News]:
    """Results of a step: a last piece gets one token, a burst's row one a round (or ``tokens``); these requests end or fail."""

    def result(row: PieceRow | BurstRow | None) -> RowResult | None:
        if row is None:
            return None
        if isinstance(row, PieceRow):
            count = int(row.last)
        else:
            sequence = scheduler._by_request.get(row.request)
            count = min(step.burst.steps if tokens is None else tokens, row.limit - sequence.committed if sequence else 0)
        return RowResult((7,) * count, row.request in ended, row.request in failed)

    prefill, burst = step.prefill.rows if step.prefill else (), step.burst.rows if step.burst else ()
    return scheduler.finish(step, Results(tuple(map(result, prefill)), tuple(map(result, burst))))


def added(scheduler: Scheduler, request: int, prompt: range, most: int = 8, **fields: object) -> Sequence:
    sequence = Sequence(request, list(prompt), len(prompt) + most, **fields)
    scheduler.add(sequence)
    return sequence


def prefilled(scheduler: Scheduler, request: int, prompt: range, most: int = 8, **fields: object) -> Sequence:
    """A request whose prefill is over, and nothing in flight."""
    sequence = added(scheduler, request, prompt, most, **fields)
    while sequence.committed < len(prompt):
        finish(scheduler, scheduler.next())
    return sequence


def test_one_request_from_its_first_piece_to_its_end():
    scheduler = Scheduler(SMALL)
    sequence = added(scheduler, 1, range(10), 6)
    one = scheduler.next()
    assert told(one) == ["piece 1 in 0: 0-8 of 8 (0, 1, 2, 3) () first"]
    assert one.prefill.rows[0].following == 8
    two = scheduler.next()
    assert told(two) == ["piece 1 in 0: 8-10 of 4 (0, 1, 2, 3) () last"]
    assert two.prefill.rows[0].following == -1
    assert scheduler.next() is None  # two are in flight
    assert finish(scheduler, one) == [News(sequence, ())]
    three = scheduler.next()
    assert told(three) == ["3 rounds 1 in 0: before 13 (0, 1, 2, 3) ()"]
    assert finish(scheduler, two) == [News(sequence, (7,))]
    # Positions that its 16 tokens need end before 15: the last one is never run.
    four = scheduler.next()
    assert told(four) == ["3 rounds 1 in 0: before 15 (0, 1, 2, 3) ()"]
    assert finish(scheduler, three) == [News(sequence, (7, 7, 7))]
    assert scheduler.next() is None  # it will surely be done
    assert finish(scheduler, four, tokens=2, ended=(1,)) == [News(sequence, (7, 7))]
    assert (sequence.state, sequence.output, scheduler.idle) == (State.DONE, [7] * 6, True)
    scheduler.check()


def test_pieces_of_one_length_go_together_and_bursts_are_short_while_anyone_waits():
    scheduler = Scheduler(SMALL)
    for request, prompt in ((1, range(8)), (2, range(100, 106)), (3, range(200, 203))):
        added(scheduler, request, prompt)
    one = scheduler.next()
    assert told(one) == ["piece 1 in 0: 0-8 of 8 (0, 1, 2) () first last", "piece 2 in 1: 0-6 of 8 (3, 4, 5) () first last"]
    two = scheduler.next()
    assert told(two) == ["1 rounds 1 in 0: before 9 (0, 1, 2) ()", "1 rounds 2 in 1: before 7 (3, 4, 5) ()"]
    finish(scheduler, one, ended=(2,))
    three = scheduler.next()
    assert told(three) == ["piece 3 in 1: 0-3 of 4 (4, 5) () first last", "1 rounds 1 in 0: before 10 (0, 1, 2) ()"]
    assert [news.sequence.request for news in finish(scheduler, two)] == [1]  # what 2 got is ignored
    four = scheduler.next()
    assert told(four)[0] == "3 rounds 1 in 0: before 13 (0, 1, 2, 6) ()"  # nobody waits
    scheduler.check()


def test_the_oldest_prefill_decides_the_length_of_the_pieces():
    scheduler = Scheduler(SMALL)
    added(scheduler, 1, range(3))
    added(scheduler, 2, range(100, 108))
    assert told(scheduler.next()) == ["piece 1 in 0: 0-3 of 4 (0, 1) () first last"]
    assert told(scheduler.next())[0] == "piece 2 in 1: 0-8 of 8 (2, 3, 4) () first last"


def test_pieces_keep_to_the_budget_but_one_always_goes():
    scheduler = Scheduler(dataclasses.replace(SMALL, piece_tokens=8))
    added(scheduler, 1, range(8))
    added(scheduler, 2, range(100, 108))
    assert [row.request for row in scheduler.next().prefill.rows] == [1]
    scheduler = Scheduler(dataclasses.replace(SMALL, piece_tokens=2))
    added(scheduler, 1, range(8))
    assert scheduler.next().prefill.length == 8


def test_a_rank_without_a_piece_of_the_length_takes_a_shorter_one():
    scheduler = Scheduler(dataclasses.replace(SMALL, data_ranks=2))
    for request, length in ((1, 8), (2, 3), (3, 3)):
        added(scheduler, request, range(100 * request, 100 * request + length))
    assert told(scheduler.next()) == ["piece 1 in 0: 0-8 of 8 (0, 1, 2) () first last", "piece 2 in 2: 0-3 of 8 (0, 1) () first last"]


def test_a_burst_is_never_longer_than_it_is_told():
    scheduler = Scheduler(SMALL)
    prefilled(scheduler, 1, range(4))
    assert scheduler.next(2).burst.steps == 2
    assert scheduler.next(0).burst.steps == 1


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
        # At a chunk's boundary no local page is shared; inside, those of the chunk's beginning.
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


def test_a_burst_is_planned_from_the_upper_bound_and_its_surplus_comes_back():
    scheduler = Scheduler(dataclasses.replace(DRAFTED, plans=((1, Plan("chain:3", 3)),), long_steps=2))
    sequence = prefilled(scheduler, 1, range(3), 40)
    one, two = scheduler.next(), scheduler.next()
    assert told(one) == ["2 rounds chain:3 1 in 0: before 11 (0, 1, 2) ()"]
    assert told(two) == ["2 rounds chain:3 1 in 0: before 19 (0, 1, 2, 3, 4) ()"]
    finish(scheduler, one, tokens=2)
    assert (sequence.committed, sequence.high, len(sequence.full)) == (5, 13, 4)
    finish(scheduler, two, tokens=8)
    assert (sequence.committed, len(sequence.full)) == (13, 4)


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


def test_a_row_that_ran_while_the_plan_was_off_has_no_drafts_and_leaves_nothing_in_the_cache():
    scheduler = Scheduler(dataclasses.replace(DRAFTED, plans=((1, None), (2, Plan("chain:2", 2)))))
    one = prefilled(scheduler, 1, range(4), 20)
    step = scheduler.next()
    assert told(step) == ["3 rounds 1 in 0: before 7 (0, 1) ()"]
    finish(scheduler, step)
    two = added(scheduler, 2, range(100, 104))
    finish(scheduler, scheduler.next(1), tokens=1)
    step = scheduler.next(1)
    assert told(step) == ["1 rounds chain:2 without drafts 1 in 0: before 11 (0, 1, 3) ()", "1 rounds chain:2 2 in 1: before 7 (2, 4) ()"]
    finish(scheduler, step, tokens=1)
    assert (one.committed, one.drafted_to, two.committed, two.drafted_to) == (9, 4, 5, 5)
    # Its second page is full of tokens, but the drafter has no valid entries for them.
    scheduler.cancel(two)
    added(scheduler, 3, one.tokens)
    assert scheduler.next().prefill.rows[0].start == 4


def test_no_plan_is_used_if_it_can_draft_for_nobody():
    scheduler = Scheduler(dataclasses.replace(DRAFTED, drafts_up_to=5))
    prefilled(scheduler, 1, range(4), 20)
    step = scheduler.next(1)
    assert step.burst.plan == Plan("chain:2", 2)
    finish(scheduler, step, tokens=2)
    assert scheduler.next(1).burst.plan is None


def test_the_plan_is_that_of_the_fullest_data_rank():
    few, many = Plan("few", 2), Plan("many", 1)
    options = dataclasses.replace(DRAFTED, data_ranks=2, plans=((2, few), (3, None), (4, many)), slots=4, row_buckets=(4,), full_pages=64)
    found = []
    for count in range(1, 9):
        scheduler = Scheduler(dataclasses.replace(options, piece_rows=(4,), piece_tokens=64))
        for request in range(count):
            added(scheduler, request, range(100 * request, 100 * request + 4))
        finish(scheduler, scheduler.next())
        found.append(scheduler.next().burst.plan)
    assert found == [few, few, few, few, None, None, many, many]


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
    assert told(step) == ["1 rounds 1 in 0: before 9 (0, 1, 3) ()"]
    assert (new.state, new.full, new.slot) == (State.PREEMPTED, [], -1)
    finish(scheduler, step, ended=(1,))
    step = scheduler.next()
    # Its first page is still in the cache. Its prompt is now its 5 tokens and the 2 that it got.
    assert told(step) == ["piece 2 in 0: 4-7 of 4 (2, 3) () first last"]
    assert (step.prefill.rows[0].tokens, step.prefill.rows[0].prompt_length) == ((104, 7, 7), 5)
    finish(scheduler, step)
    assert new.output == [7, 7, 7]


def contested(**options: object) -> tuple[Scheduler, Sequence, Sequence, Step]:
    """As :func:`crowded`, with the burst that leads there in flight."""
    scheduler = Scheduler(dataclasses.replace(SMALL, full_pages=4, long_steps=1, **options))
    old, new = added(scheduler, 1, range(7)), added(scheduler, 2, range(100, 105))
    finish(scheduler, scheduler.next())
    one = scheduler.next()
    assert told(one) == ["1 rounds 1 in 0: before 8 (0, 1) ()", "1 rounds 2 in 1: before 6 (2, 3) ()"]
    return scheduler, old, new, one


def test_what_a_preempted_sequence_has_in_flight_is_dropped_and_what_it_may_write_is_zeroed():
    scheduler, old, new, one = contested()
    assert told(scheduler.next()) == ["zero ((0, 3),)", "1 rounds 1 in 0: before 9 (0, 1, 3) ()"]
    assert finish(scheduler, one) == [News(old, (7,))]
    assert (new.state, new.output) == (State.PREEMPTED, [7])


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
    assert (new.state, new.output) == (State.RUNNING, [7, 7])


def test_a_saved_sequence_gets_its_last_results_and_comes_back_after_them():
    scheduler, old, new, one = contested(**PINNED)
    two = scheduler.next()
    assert told(two) == ["save 2 of slot 1: (2, 3) ()", "zero ((0, 3),)", "1 rounds 1 in 0: before 9 (0, 1, 2) ()", "-"]
    scheduler.cancel(old)
    assert finish(scheduler, one) == [News(new, (7,))]
    assert (new.state, new.output) == (State.PREEMPTED, [7, 7])
    three = scheduler.next()
    assert three.loads and len(three.loads[0].full) == 2  # the page of positions 4 to 8 has its 6th token


def test_a_saved_sequence_may_end_while_it_waits():
    scheduler, _, new, one = contested(**PINNED)
    scheduler.next()
    finish(scheduler, one, ended=(2,))
    assert new.state is State.DONE
    scheduler.check()


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


def test_a_failed_row_ends_alone_and_its_pages_are_zeroed_by_the_next_step():
    scheduler = Scheduler(CHUNKED)
    bad, good = added(scheduler, 1, range(6)), added(scheduler, 2, range(100, 106))
    finish(scheduler, scheduler.next())
    one, two = scheduler.next(), scheduler.next()
    assert told(one)[0] == "3 rounds 1 in 0: before 8 (0, 1) (0, 1)"
    assert told(two)[0] == "3 rounds 1 in 0: before 11 (0, 1, 5) (4,)"
    assert finish(scheduler, one, failed=(1,)) == [News(bad, ()), News(good, (7, 7))]
    assert (bad.state, good.state, bad.output) == (State.FAILED, State.RUNNING, [7])
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


def test_the_same_calls_and_results_give_the_same_digests_and_others_do_not():
    def digests(prompt: range, token: int) -> list[str]:
        scheduler, found = Scheduler(CHUNKED), []
        added(scheduler, 1, prompt)
        for _ in range(4):
            step = scheduler.next(1)
            found.append(scheduler.digest())
            result = (RowResult((token,)),)
            scheduler.finish(step, Results(result, ()) if step.prefill else Results((), result))
            found.append(scheduler.digest())
        return found

    assert digests(range(6), 7) == digests(range(6), 7)
    assert len({*digests(range(6), 7), *digests(range(1, 7), 7)}) == 16
    assert [one == other for one, other in zip(digests(range(6), 7), digests(range(6), 8), strict=True)] == [True] + [False] * 7


@pytest.mark.parametrize(
    ("options", "prompt", "most", "line"),
    [
        (SMALL, 60, 6, r"request 1 \(60 prompt tokens, at most 66 in all\) may need 17 pages of the KV cache, and there are 16; shorten.*"),
        (dataclasses.replace(CHUNKED, local_pages=1), 6, 2, ".* may need 2 chunk-local pages of the KV cache, and there are 1; .*"),
        (SMALL, 0, 4, "request 1 has 0 prompt tokens and at most 4 in all; expected at least one prompt token and room for one more"),
        (SMALL, 4, 0, "request 1 has 4 prompt tokens and at most 4 in all; expected .*"),
    ],
)
def test_a_request_that_can_never_fit_is_refused_in_one_line(options, prompt, most, line):
    scheduler = Scheduler(options)
    with pytest.raises(ValueError, match=f"^{line}$"):
        added(scheduler, 1, range(prompt), most)
    assert scheduler.idle


def test_the_largest_request_that_fits_is_served():
    scheduler = Scheduler(dataclasses.replace(CHUNKED, local_pages=2))
    sequence = added(scheduler, 1, range(60), 5)
    for _ in range(100):
        if (step := scheduler.next()) is None:
            break
        finish(scheduler, step)
    assert len(sequence.tokens) == 65


def test_a_number_names_one_request_at_a_time():
    scheduler = Scheduler(SMALL)
    sequence = added(scheduler, 1, range(4))
    with pytest.raises(ValueError, match="request 1 is under way already"):
        added(scheduler, 1, range(4))
    scheduler.cancel(sequence)
    added(scheduler, 1, range(4))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"row_buckets": (1,)}, "row_buckets are .*; expected the last to be the number of slots, 2"),
        ({"plans": ((1, Plan("chain:2", 2)),)}, "there are plans of speculation and no drafter; expected a drafter, or no plan"),
        ({"deterministic": True}, "deterministic with row_buckets .*; expected one of each"),
        (
            {"deterministic": True, "row_buckets": (2,), "piece_lengths": (6,), "piece_rows": (1,)},
            "deterministic with pieces of 6 tokens; expected a multiple of 4, .*",
        ),
    ],
)
def test_options_that_do_not_fit_together_are_refused(change, line):
    with pytest.raises(ValueError, match=f"^{line}$"):
        dataclasses.replace(SMALL, **change)

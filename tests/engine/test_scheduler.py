"""Steps, pieces, bursts and plans: what is called, and the steps that are expected, written out."""

from __future__ import annotations

import dataclasses

import pytest

from l4jax.engine.scheduler import Scheduler
from l4jax.engine.sequence import State
from l4jax.engine.step import News, Plan, Results, RowResult
from tests.engine.calls import CHUNKED, DRAFTED, LATEST, SMALL, added, finish, output, prefilled, told


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
    assert (sequence.state, output(sequence), scheduler.idle) == (State.DONE, [7] * 6, True)
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


def test_with_a_guide_one_token_is_read_before_the_next_is_planned():
    """All rows then have one round; without the guided row bursts are long again, and two steps are in flight."""
    scheduler = Scheduler(SMALL)
    prefilled(scheduler, 1, range(4), 20)
    added(scheduler, 2, range(100, 112), 3, guided=True)
    pieces = [scheduler.next(), scheduler.next()]
    assert told(pieces[0])[0].startswith("piece 2 in 1: 0-8 of 8")  # its prefill is two deep
    assert told(pieces[1])[0].startswith("piece 2 in 1: 8-12 of 4")
    finish(scheduler, pieces[0])
    assert scheduler.next() is None
    finish(scheduler, pieces[1])
    for before in (13, 14):
        step = scheduler.next()
        assert [words.partition(": before")[0] for words in told(step)] == ["1 rounds 1 in 0", "1 rounds 2 in 1"]
        assert f"before {before} " in told(step)[1]
        assert scheduler.next() is None
        finish(scheduler, step, ended=(2,) if before == 14 else ())
    assert told(scheduler.next())[0].startswith("3 rounds 1 in 0") and scheduler.next() is not None


def test_bursts_are_short_beside_a_prefill():
    scheduler = Scheduler(SMALL)
    prefilled(scheduler, 1, range(4), 20)
    added(scheduler, 2, range(100, 112))
    found = []
    for _ in range(3):
        step = scheduler.next()
        found.append((step.burst.steps, step.prefill is not None))
        finish(scheduler, step)
    assert found == [(1, True), (1, True), (3, False)]


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


@pytest.mark.parametrize(
    ("options", "prompt", "most", "line"),
    [
        (
            SMALL,
            60,
            6,
            r"a prompt of 60 tokens with up to 6 of output may need room for 65 tokens in the KV cache, which holds 64 of one request "
            r"\(16 pages of 4\); shorten the prompt, lower max_tokens, or load with a larger kv_tokens",
        ),
        (
            dataclasses.replace(SMALL, full_pages=1),
            1,
            9,
            r"a prompt of 1 token with up to 9 of output may need room for 9 tokens .* holds 4 of one request \(1 page of 4\); .*",
        ),
        (
            dataclasses.replace(CHUNKED, local_pages=1),
            6,
            2,
            r"a prompt of 6 .* for 7 tokens in the KV cache of chunk-local layers, which holds 4 .* \(1 page of 4\); .*",
        ),
        (SMALL, 0, 4, "request 1 has 0 prompt tokens and at most 4 in all; expected at least one prompt token and room for one more"),
        (SMALL, 4, 0, "request 1 has 4 prompt tokens and at most 4 in all; expected .*"),
    ],
)
def test_a_request_that_can_never_fit_is_refused_in_one_line(options, prompt, most, line):
    scheduler = Scheduler(options)
    with pytest.raises(ValueError, match=f"^{line}$"):
        added(scheduler, 1, range(prompt), most)
    assert scheduler.idle


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


def test_a_scored_sequence_ends_with_its_last_piece_and_its_pieces_go_alone():
    scheduler = Scheduler(dataclasses.replace(SMALL, full_pages=16, slots=2, row_buckets=(1, 2)))
    added(scheduler, 1, range(3))
    scored = added(scheduler, 2, range(12), most=1, scope=None, scores=True)
    kinds = []
    while scored.state is not State.DONE:
        step = scheduler.next()
        if step.prefill is not None:
            kinds.append((step.prefill.scores, {row.request for row in step.pieces if row}))
        results = [row and RowResult((), row.last) if step.prefill.scores else row and RowResult((7,) * row.last) for row in step.pieces]
        bursts = [row and RowResult((7,) * (row.limit - LATEST[row.request].committed)) for row in step.rows]
        assert all(row is None or row.request == 1 for row in step.rows), "a scored sequence decodes"
        scheduler.finish(step, Results(tuple(results), tuple(bursts)))
    assert kinds[0] == (False, {1})
    assert kinds[1:] == [(True, {2})] * len(kinds[1:])
    assert scored.tokens == list(range(12))
    assert (scored.slot, scored.full) == (-1, [])


@pytest.mark.parametrize("changes", [{"scope": b""}, {"most": 2}])
def test_a_scored_sequence_shares_nothing_and_generates_nothing(changes):
    with pytest.raises(ValueError, match=r"request 1 is scored, with scope .*; expected scope None"):
        added(Scheduler(SMALL), 1, range(3), **{"most": 1, "scope": None, "scores": True, **changes})

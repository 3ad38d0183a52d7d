"""The digest by which hosts find that their schedulers have drifted apart: all that decides the next steps changes it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest

from l4jax.engine.commands import _checksum
from l4jax.engine.scheduler import Scheduler
from l4jax.engine.sequence import Flight, Sequence, State
from l4jax.engine.step import Burst, BurstRow, PieceRow, Plan, Prefill, Results, RowResult, Step
from tests.engine.calls import CHUNKED, added, finish, prefilled


def busy() -> Scheduler:
    """One sequence decodes, one is prefilled, one waits; pages are free, cached and used; a step is in flight."""
    scheduler = Scheduler(dataclasses.replace(CHUNKED, full_pages=32, local_pages=16, plans=((1, Plan("chain:2", 2)),), drafter=True))
    scheduler.cancel(prefilled(scheduler, 9, range(300, 309)))
    prefilled(scheduler, 1, range(6))
    added(scheduler, 2, range(100, 120))
    added(scheduler, 3, range(200, 206))
    finish(scheduler, scheduler.next(1), tokens=1)
    scheduler.next(1)
    return scheduler


CHANGES: dict[str, object] = {
    "request": 77,
    "tokens": [8] * 6,
    "max_length": 77,
    "scope": b"other",
    "state": State.PREEMPTED,
    "prompt_length": 3,
    "arrival": 77,
    "rank": 1,
    "slot": 7,
    "target": 77,
    "scores": True,
    "guided": True,
    "hit": 4,
    "committed": 77,
    "low": 77,
    "high": 77,
    "flights": [Flight(1, 1, 1, 9)],
    "full": [31, 30],
    "local": {0: [7]},
    "named": 77,
    "saved": True,
    "digests": [b"other"],
}


@pytest.mark.parametrize("place", ["decodes", "is prefilled", "waits"])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Sequence)])
def test_each_field_of_a_sequence_changes_the_digest(name, place):
    scheduler = busy()
    sequence = next(s for s in scheduler._by_request.values() if s.request == ["decodes", "is prefilled", "waits"].index(place) + 1)
    before = scheduler.digest()
    assert before == scheduler.digest() == busy().digest()
    assert getattr(sequence, name) != CHANGES[name]
    setattr(sequence, name, CHANGES[name])
    assert scheduler.digest() != before


def swap(values: list[int], at: int = 0) -> None:
    values[at], values[at + 1] = values[at + 1], values[at]


def swap_references(pages: object) -> None:
    swap(pages._references, next(i for i, (one, other) in enumerate(itertools.pairwise(pages._references)) if one != other))


def rename(pages: object, change: Callable[[tuple[bytes, int]], tuple[bytes, int]]) -> None:
    key = next(iter(pages._by_key))
    page = pages._by_key.pop(key)
    pages._by_key = {change(key): page, **pages._by_key}


def move_to_cached(pages: object) -> None:
    pages._cached = dict.fromkeys([pages._free.pop(), *pages._cached])


def use_again(pages: object) -> None:
    pages._cached = dict.fromkeys(reversed(pages._cached))


def exchange(pages: object) -> None:
    one, other, *_ = pages._by_key
    pages._by_key[one], pages._by_key[other] = pages._by_key[other], pages._by_key[one]


@pytest.mark.parametrize("kind", ["full", "local"])
@pytest.mark.parametrize(
    "change",
    [
        lambda pages: swap(pages._free),
        move_to_cached,
        use_again,
        exchange,
        swap_references,
        lambda pages: rename(pages, lambda key: (key[0][::-1], key[1])),
        lambda pages: rename(pages, lambda key: (key[0], key[1] + 4)),
    ],
)
def test_the_order_the_uses_and_the_contents_of_pages_change_the_digest(kind, change):
    scheduler = busy()
    pages, before = getattr(scheduler.ranks[0].pool, kind), scheduler.digest()
    assert len(pages._cached) > 1 and len(pages._by_key) > 1
    change(pages)
    assert scheduler.digest() != before


@pytest.mark.parametrize(
    "change",
    [
        lambda scheduler: scheduler.ranks[0]._slots.append(5),
        lambda scheduler: scheduler.ranks[0].zero_full.append((0, 3)),
        lambda scheduler: scheduler.ranks[0].zero_local.append((0, 3)),
        lambda scheduler: scheduler._drops.append(3),
        lambda scheduler: scheduler._steps.clear(),
        lambda scheduler: scheduler._steps.append(dataclasses.replace(scheduler._steps.pop(), burst=None)),
        lambda scheduler: scheduler._steps.append(dataclasses.replace(scheduler._steps.pop(), prefill=None)),
        lambda scheduler: setattr(scheduler, "_number", 99),
        lambda scheduler: setattr(scheduler, "_arrivals", 99),
        lambda scheduler: setattr(scheduler, "options", dataclasses.replace(scheduler.options, long_steps=9)),
        lambda scheduler: added(scheduler, 4, range(3)),
    ],
)
def test_the_ranks_state_and_the_schedulers_change_the_digest(change):
    scheduler = busy()
    before = scheduler.digest()
    change(scheduler)
    assert scheduler.digest() != before


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


PIECE = PieceRow(
    request=1, slot=2, start=4, tokens=(5, 6), before=(), first=True, last=False, prompt_length=9, following=7, full=(3, 4, 5), local=(8, 9)
)
ROW = BurstRow(request=1, slot=2, limit=9, full=(3, 4, 5), local=(8, 9))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("request", 9), ("slot", 9), ("start", 9), ("limit", 8), ("tokens", (5, 6, 7)), ("first", False), ("last", True)],
        *[("full", (3, 4)), ("full", (3, 4, 6)), ("full", (3, 9, 5)), ("full", (2, 3, 4, 5))],
        *[("local", (8,)), ("local", (7, 9)), ("local", (8, 7)), ("local", ())],
    ],
)
def test_what_programs_are_told_of_a_row_changes_a_steps_checksum(name, value):
    def step(piece, row):
        return Step(1, (), (), (), (), (), Prefill(8, (None, piece), False), Burst(2, None, (row, None)))

    expected = _checksum(step(PIECE, ROW))
    assert expected == _checksum(step(dataclasses.replace(PIECE), dataclasses.replace(ROW)))
    changed = [row for row in (PIECE, ROW) if hasattr(row, name)]
    assert changed
    for row in changed:
        other = dataclasses.replace(row, **{name: value})
        assert _checksum(step(other, ROW) if row is PIECE else step(PIECE, other)) != expected

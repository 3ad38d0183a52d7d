"""The fake device notices what would spoil a real one: pages that hold NaN, and slots that count other tokens."""

from __future__ import annotations

import dataclasses
import random

import pytest

from l4jax.engine.options import Options
from l4jax.engine.scheduler import Scheduler
from l4jax.engine.sequence import Sequence, State
from l4jax.engine.step import Step
from tests.engine import fake
from tests.engine.calls import CHUNKED, SMALL
from tests.engine.fake import FakeDevice, Truth, padded


def started(options: Options) -> tuple[Scheduler, FakeDevice]:
    return Scheduler(options), FakeDevice(options, random.Random(0))


def added(scheduler: Scheduler, device: FakeDevice, request: int, prompt: list[int], fails_at: int | None = None) -> Sequence:
    """A request for 9 tokens, or fewer if a stop token comes."""
    sequence = Sequence(request, prompt, len(prompt) + 9)
    device.truths[request] = Truth(scheduler.options, sequence, fails_at)
    scheduler.add(sequence)
    return sequence


def test_a_table_is_padded_with_its_own_last_page():
    assert padded((4, 2), 5) == (4, 2, 2, 2, 2)
    assert padded((4, 2), 2) == (4, 2)


@pytest.mark.parametrize("options", [SMALL, CHUNKED])
def test_a_failed_row_runs_again_before_anyone_knows_and_spoils_nobody(options):
    scheduler, device = started(options)
    bad, good = added(scheduler, device, 1, [0, 1, 2, 0, 1], fails_at=5), added(scheduler, device, 2, [1] * 7)
    one = scheduler.next(1)
    scheduler.finish(one, device.run(one))
    two, three = scheduler.next(1), scheduler.next(1)
    results = device.run(two)
    assert [result.failed for result in results.burst] == [True, False]
    assert fake.NAN in device.full[0][two.rows[0].full[1]]
    assert [row.request for row in three.rows] == [1, 2]
    later = device.run(three)
    scheduler.finish(two, results)
    assert (bad.state, good.state) == (State.FAILED, State.RUNNING)
    scheduler.finish(three, later)
    while not scheduler.idle:
        step = scheduler.next()
        scheduler.finish(step, device.run(step))
    assert (good.state, good.tokens) == (State.DONE, device.truths[2].tokens)


def test_a_short_row_that_is_padded_with_anothers_page_may_read_nan(monkeypatch):
    """Page 0 is that of the row that fails: what another one reads of it is masked, but 0 x NaN is NaN."""

    def last_step() -> Step:
        some = dataclasses.replace(SMALL, slots=3, row_buckets=(3,), piece_lengths=(8,), piece_rows=(3,), piece_tokens=64)
        scheduler, device = started(some)
        added(scheduler, device, 1, [0, 1, 2], fails_at=3)
        added(scheduler, device, 2, [1] * 8)
        added(scheduler, device, 3, [2])
        step = scheduler.next(1)
        scheduler.finish(step, device.run(step))
        step = scheduler.next(1)
        device.run(step)
        return step

    step = last_step()
    assert step.rows[0].full[0] == 0 and len(step.rows[2].full) < len(step.rows[1].full)
    monkeypatch.setattr(fake, "padded", lambda table, count: table + (0,) * (count - len(table)))
    with pytest.raises(AssertionError, match="may read NaN"):
        last_step()


def run_to_first_burst(scheduler: Scheduler, device: FakeDevice, **changes: object) -> None:
    """Run steps until a burst has run, each piece changed in this way if it is the first in its slot."""
    while True:
        step = scheduler.next(1)
        prefill = step.prefill and dataclasses.replace(
            step.prefill, rows=tuple(row and (dataclasses.replace(row, **changes) if row.first else row) for row in step.pieces)
        )
        scheduler.finish(step, device.run(dataclasses.replace(step, prefill=prefill)))
        if step.burst:
            return


@pytest.mark.parametrize("before", [(), (0, 1, 2, 1)])
def test_a_slot_must_count_the_tokens_of_the_hit(before):
    for changes in ({}, {"before": before}):
        scheduler, device = started(SMALL)
        first = added(scheduler, device, 1, [0, 1, 2, 0, 1])
        while first.committed < 5:
            step = scheduler.next()
            scheduler.finish(step, device.run(step))
        scheduler.cancel(first)
        added(scheduler, device, 2, [0, 1, 2, 0, 1, 1])
        if not changes:
            run_to_first_burst(scheduler, device)
            continue
        with pytest.raises(AssertionError, match="counts another prompt"):
            run_to_first_burst(scheduler, device, **changes)


def test_a_slot_counts_output_that_is_computed_again_as_output():
    scheduler, device = started(dataclasses.replace(SMALL, slots=1, row_buckets=(1,), full_pages=16))
    sequence = added(scheduler, device, 1, [0, 1, 2, 0, 1])
    run_to_first_burst(scheduler, device)
    again = Sequence(2, list(sequence.tokens), sequence.max_length)
    again.prompt_length = sequence.prompt_length  # as after a preemption
    scheduler.cancel(sequence)
    device.truths[2] = dataclasses.replace(device.slots[0]).truth
    device.truths[2].request = 2
    scheduler.add(again)
    run_to_first_burst(scheduler, device)
    slot = device.slots[0]
    assert slot.produced == len(again.tokens) - 5 == sum(slot.output.values())
    assert dict(slot.prompt) == {0: 2, 1: 2, 2: 1}

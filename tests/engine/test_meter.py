"""Where the engine's time went, on a clock that the test moves."""

from __future__ import annotations

import dataclasses
import types

import pytest

from l4jax.answer import Rounds
from l4jax.engine import meter as module
from l4jax.engine.meter import Meter
from l4jax.engine.scheduler import Scheduler
from l4jax.engine.sequence import Sequence
from l4jax.engine.step import Burst
from tests.engine.calls import SMALL


@pytest.fixture
def clock(monkeypatch):
    found = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: found.now))
    return found


def test_time_is_the_host_s_the_devices_or_idle(clock):
    meter, scheduler = Meter(), Scheduler(SMALL)

    def iterate(*, finished_before, wait, finished_after, idle):
        meter.begin(finished=finished_before)
        clock.now += 1  # planning
        meter.dispatched(Burst(8, None, ()))
        clock.now += wait
        meter.read(wait)
        clock.now += 2  # delivering
        meter.end(idle=idle, finished=finished_after)
        state = meter.state(scheduler)
        return state.host_seconds, state.idle_seconds

    assert iterate(finished_before=False, wait=5, finished_after=False, idle=False) == (3, 0)
    # The devices finished while the host delivered: idle until the next step is dispatched, between iterations too.
    assert iterate(finished_before=False, wait=5, finished_after=True, idle=False) == (6, 0)
    clock.now += 10
    assert iterate(finished_before=True, wait=0, finished_after=False, idle=False) == (9, 11)
    # Found out only when the next iteration begins.
    assert iterate(finished_before=True, wait=0, finished_after=True, idle=True) == (12, 12)
    # Nobody had asked for anything.
    clock.now += 1000
    assert iterate(finished_before=False, wait=4, finished_after=False, idle=False) == (15, 12)


def test_a_night_without_requests_is_not_idle_time(clock):
    """A guided request leaves nothing in flight between its steps; its client leaves; then nobody asks for an hour."""
    meter, scheduler = Meter(), Scheduler(SMALL)
    meter.begin(finished=False)
    meter.dispatched(Burst(1, None, ()))
    meter.end(idle=False, finished=True)
    clock.now += 1
    meter.begin(finished=False)  # the iteration that finds nothing to do
    meter.end(idle=True, finished=True)
    clock.now += 3600
    meter.begin(finished=False)
    meter.dispatched(Burst(1, None, ()))
    assert meter.state(scheduler).idle_seconds == 0


def test_preemptions_are_counted_over_restarts():
    meter, scheduler = Meter(), Scheduler(SMALL)
    scheduler.preemptions = 3
    assert meter.state(scheduler).preemptions == 3
    meter.restart(scheduler)
    assert meter.state(Scheduler(SMALL)).preemptions == 3


def test_who_waits_for_a_prefix_is_deferred():
    scheduler = Scheduler(dataclasses.replace(SMALL, slots=2, row_buckets=(2,)))
    block = SMALL.shape.block
    scheduler.add(Sequence(1, [1] * (2 * block), 2 * block + 4))
    assert scheduler.next() is not None
    scheduler.add(Sequence(2, [1] * (2 * block), 2 * block + 4))
    scheduler.next()
    assert (Meter().state(scheduler).waiting, Meter().state(scheduler).deferred) == (1, True)
    scheduler.add(Sequence(3, [2] * 5, 9))
    scheduler.cancel(scheduler.waiting[0])
    assert not Meter().state(scheduler).deferred


def test_bursts_are_counted_by_their_rounds():
    meter = Meter()
    for steps in (1, 1, 2, 3, 4, 5, 8, 9):
        meter.dispatched(Burst(steps, None, ()))
    meter.dispatched(None)
    meter.speculated(Rounds(3, 9, (2,)))
    meter.speculated(Rounds(1, 3, (1, 1)))
    state = meter.state(Scheduler(SMALL))
    assert state.bursts == (2, 1, 2, 2, 1) and state.burst_rounds == 33
    assert state.speculation == Rounds(4, 12, (3, 1))

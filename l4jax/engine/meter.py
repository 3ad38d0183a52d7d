"""What the engine has done, and where its time went, for operators. Imports no JAX."""

from __future__ import annotations

import dataclasses
import time

from l4jax.answer import NO_ROUNDS, Rounds
from l4jax.engine.scheduler import Scheduler
from l4jax.engine.step import Burst


@dataclasses.dataclass(frozen=True)
class EngineState:
    """What the engine has under way, and counts since it was made.

    ``deferred``: whether the requests that wait do so for a prefix that another one is computing; otherwise they wait for a slot or for
    pages. ``used_pages``: those that hold tokens of requests under way, of all ``pages``. ``prompt_tokens``: tokens that were
    looked up in the prefix cache, of which it had ``hit_tokens``.

    ``bursts[i]``: bursts that were given at most 2^i rounds, and more than 2^(i - 1); ``burst_rounds``: rounds of all bursts.
    ``host_seconds``: time in which the host worked and did not wait for the devices. ``idle_seconds``: time in which the devices had
    nothing to do though requests were under way; at least that, because the host does not learn at once that they have finished.
    """

    running: int
    waiting: int
    deferred: bool
    used_pages: int
    pages: int
    preemptions: int
    prompt_tokens: int
    hit_tokens: int
    bursts: tuple[int, ...]
    burst_rounds: int
    host_seconds: float
    idle_seconds: float
    speculation: Rounds


class Meter:
    """Counts what one engine does. ``begin`` and ``end`` are called around each of its iterations."""

    def __init__(self) -> None:
        self._prompt_tokens = self._hit_tokens = self._burst_rounds = 0
        self._bursts: list[int] = []
        self._host_seconds = self._idle_seconds = 0.0
        self._speculation = NO_ROUNDS
        self._began = 0.0
        self._idle_since: float | None = None
        self._preemptions = 0  # by earlier schedulers

    def restart(self, scheduler: Scheduler) -> None:
        """The engine drops this scheduler, and everything under way."""
        self._preemptions += scheduler.preemptions
        self._idle_since = None

    def begin(self, *, finished: bool) -> None:
        """An iteration begins; ``finished``: steps are in flight, and the devices have finished all of them."""
        self._began = time.perf_counter()
        if finished and self._idle_since is None:
            self._idle_since = self._began

    def prefilled(self, tokens: int, hit_tokens: int) -> None:
        """A prefill of this many tokens, which were looked up in the prefix cache, has begun; it had ``hit_tokens`` of them."""
        self._prompt_tokens += tokens
        self._hit_tokens += hit_tokens

    def dispatched(self, burst: Burst | None) -> None:
        """A step was dispatched."""
        if self._idle_since is not None:
            self._idle_seconds += time.perf_counter() - self._idle_since
            self._idle_since = None
        if burst is not None:
            self._burst_rounds += burst.steps
            bucket = (burst.steps - 1).bit_length()
            self._bursts += [0] * (bucket + 1 - len(self._bursts))
            self._bursts[bucket] += 1

    def read(self, waited_seconds: float) -> None:
        """The results of a step were read, for which the host waited this long."""
        self._host_seconds -= waited_seconds

    def speculated(self, rounds: Rounds) -> None:
        """A row has had these rounds of speculation."""
        self._speculation = self._speculation.and_then(rounds)

    def end(self, *, idle: bool, finished: bool) -> None:
        """An iteration ends. ``idle``: no request is under way any more; ``finished``: the devices have nothing to do."""
        now = time.perf_counter()
        self._host_seconds += now - self._began
        self._idle_since = now if finished and not idle else None

    def state(self, scheduler: Scheduler) -> EngineState:
        """The counts, and what the scheduler has under way."""
        pools = [rank.pool.full for rank in scheduler.ranks]
        pages = sum(pool.count for pool in pools)
        return EngineState(
            running=sum(len(rank.active) for rank in scheduler.ranks),
            waiting=len(scheduler.waiting),
            deferred=_is_deferred(scheduler),
            used_pages=pages - sum(pool.available for pool in pools),
            pages=pages,
            preemptions=self._preemptions + scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            hit_tokens=self._hit_tokens,
            bursts=tuple(self._bursts),
            burst_rounds=self._burst_rounds,
            host_seconds=self._host_seconds,
            idle_seconds=self._idle_seconds,
            speculation=self._speculation,
        )


def _is_deferred(scheduler: Scheduler) -> bool:
    """Whether the first of the waiting requests, for which the others wait, waits for a prefix that is being computed."""
    open_ranks = [rank for rank in scheduler.ranks if rank.has_slot]
    if not scheduler.waiting or not open_ranks or scheduler.waiting[0].saved:
        return False
    first = scheduler.waiting[0]
    return any(rank.is_writing(first, rank.prefix(first)) for rank in open_ranks)

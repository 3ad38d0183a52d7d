"""On several hosts process 0 decides what each iteration of the engine does, and tells the others before anything is dispatched.

A command is a line of JSON: the requests to take in and to cancel, the most rounds of a burst, a checksum of each step to dispatch and, in
every 64th command, a digest of the scheduler's state. The other processes plan the same steps and compare. A process whose steps differ
ends the job, because programs that do not match would wait for each other for ever.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import zlib
from collections import deque
from collections.abc import Container, Sequence

from l4jax.engine.scheduler import Scheduler
from l4jax.engine.step import BurstRow, PieceRow, Step
from sharding import hosts

_CHECKED = 64
"""Iterations between two comparisons of the schedulers' states."""
ASKED_SECONDS = 60
"""How long another process may take to make a call that process 0 has made."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What an iteration does. ``calls``: the numbers of requests to take in, and, negated, of those to cancel, in order.

    ``most_steps``: the most rounds of a burst. ``dispatched``: how many steps are dispatched, None in process 0, which decides it later.
    ``text``: the command as process 0 has sent it, "" in process 0.
    """

    calls: list[int]
    most_steps: int
    dispatched: int | None = None
    text: str = ""


class Commands:
    """The commands of an engine, one an iteration. A process that is alone decides for itself."""

    def __init__(self) -> None:
        self.several = hosts.process_count() > 1
        self.decides = hosts.process_id() == 0
        self._broadcast = hosts.Broadcast() if self.several else None
        self._count = 0

    def begin(self, calls: deque[int], most_steps: int) -> Command:
        """The next iteration's command: in process 0 of the calls in the queue, which it empties; in others as process 0 has sent it."""
        if self.decides:
            return Command([calls.popleft() for _ in range(len(calls))], most_steps)
        assert self._broadcast is not None
        text = self._broadcast.receive()
        taken_in, most_steps, steps, _ = json.loads(text)
        return Command(taken_in, most_steps, len(steps), text)

    def await_request(self, number: int, asked: Container[int], changed: threading.Condition) -> None:
        """Wait until this process, too, is asked for a request that process 0 has taken in; end the job if that takes too long."""
        with changed:
            if not changed.wait_for(lambda: number in asked, ASKED_SECONDS):
                hosts.end_drifted(f"for {ASKED_SECONDS} s it has not been asked for request {number}")

    def settle(self, command: Command, steps: Sequence[Step], scheduler: Scheduler) -> None:
        """Call before the steps are dispatched: process 0 sends the command; another process compares, and ends the job if it differs."""
        if self._broadcast is None:
            return
        self._count += 1
        state = scheduler.digest() if self._count % _CHECKED == 0 else ""
        text = json.dumps([command.calls, command.most_steps, [_checksum(step) for step in steps], state])
        if self.decides:
            self._broadcast.send(text)
        elif text != command.text:
            same_steps = json.loads(text)[2] == json.loads(command.text)[2]
            what = "its scheduler has another state" if same_steps else "it would dispatch another step"
            hosts.end_drifted(f"{what} in iteration {self._count}")


def _checksum(step: Step) -> int:
    """A checksum of the step without its tokens. Of a full page table it covers only the length and the last two pages."""

    def about(row: PieceRow | BurstRow | None) -> object:
        if row is None:
            return None
        where = row.request, row.slot, len(row.full), row.full[-2:], row.local
        return (*where, row.start, len(row.tokens), row.first, row.last) if isinstance(row, PieceRow) else (*where, row.limit)

    prefill = step.prefill and (step.prefill.length, step.prefill.scores, list(map(about, step.prefill.rows)))
    burst = step.burst and (step.burst.steps, step.burst.plan, list(map(about, step.burst.rows)))
    copies = step.drops, step.saves, step.zero_full, step.zero_local, step.loads
    return zlib.crc32(repr((step.number, copies, prefill, burst)).encode())

"""On several hosts process 0 decides what each iteration of the engine does, and tells the others before anything is dispatched.

A command is a line of JSON: the requests that are taken in and those that are cancelled, the most rounds of a burst, a checksum of each
step that is dispatched and, in every 64th, a digest of all that decides later steps. The others do the same and compare: one that
would dispatch something else ends the job instead, because programs that do not fit together would wait for each other for ever.
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
"""Seconds that another process may be behind process 0 in making a call."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What an iteration does: ``calls``, the numbers of requests to take in, and negated of those to cancel, in order; ``most_steps``.

    ``dispatched``: how many steps, None where that is not decided yet. ``text``: as process 0 has sent it, "" in process 0.
    """

    calls: list[int]
    most_steps: int
    dispatched: int | None = None
    text: str = ""


class Commands:
    """The commands of an engine, one an iteration. In a process that is alone, its own decisions."""

    def __init__(self) -> None:
        self.decides = hosts.process_id() == 0
        self._broadcast = hosts.Broadcast() if hosts.process_count() > 1 else None
        self._count = 0

    def begin(self, calls: deque[int], most_steps: int) -> Command:
        """What the next iteration takes in: process 0's own calls, which leave the queue, or what process 0 has sent."""
        if self.decides:
            return Command([calls.popleft() for _ in range(len(calls))], most_steps)
        assert self._broadcast is not None
        text = self._broadcast.receive()
        taken_in, most_steps, steps, _ = json.loads(text)
        return Command(taken_in, most_steps, len(steps), text)

    def await_request(self, number: int, asked: Container[int], changed: threading.Condition) -> None:
        """Wait until this process is asked for a request that process 0 has taken in; end the job if it is not."""
        with changed:
            if not changed.wait_for(lambda: number in asked, ASKED_SECONDS):
                hosts.end_drifted(f"for {ASKED_SECONDS} s it has not been asked for request {number}")

    def settle(self, command: Command, steps: Sequence[Step], scheduler: Scheduler) -> None:
        """Before its steps are dispatched: send the command, or end the job if this process would do something else."""
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
    """A checksum of the step without its tokens. Of a page table it takes the length and the last two pages."""

    def about(row: PieceRow | BurstRow | None) -> object:
        if row is None:
            return None
        where = row.request, row.slot, len(row.full), row.full[-2:], row.local
        return (*where, row.start, len(row.tokens), row.first, row.last) if isinstance(row, PieceRow) else (*where, row.limit)

    prefill = step.prefill and (step.prefill.length, step.prefill.scores, list(map(about, step.prefill.rows)))
    burst = step.burst and (step.burst.steps, step.burst.plan, list(map(about, step.burst.rows)))
    copies = step.drops, step.saves, step.zero_full, step.zero_local, step.loads
    return zlib.crc32(repr((step.number, copies, prefill, burst)).encode())

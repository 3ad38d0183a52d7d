"""When requests are sent: by clients that wait for answers (a closed loop), or at random times (an open loop)."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import time
from collections.abc import Iterator

from l4jax.bench.answer import Answer
from l4jax.bench.client import Cancel, Clock, Server, stream
from l4jax.bench.requests import PATHS, Content, Planned, Requests


@dataclasses.dataclass(frozen=True)
class Pattern:
    """When requests are sent: by ``clients`` that wait for their answers, or ``rate`` a second; until ``requests`` or ``seconds``."""

    clients: int | None = None
    rate: float | None = None
    requests: int | None = None
    seconds: float | None = None
    warmup: int = 0
    timeout_s: float = 600.0


def arrivals(seed: int, phase: str, rate: float) -> Iterator[float]:
    """The times, in seconds after the beginning, at which requests of a Poisson process arrive: ``rate`` a second on average."""
    generator, at = random.Random(f"{seed} {phase} arrivals"), 0.0
    while True:
        at += generator.expovariate(rate)
        yield at


@dataclasses.dataclass(frozen=True)
class Sent:
    """A request and its answer. ``due``: when it was to be sent, in an open loop."""

    number: int
    planned: Planned
    answer: Answer
    due: float | None


@dataclasses.dataclass(frozen=True)
class Measured:
    """All requests but those that warm up, by number; ``began`` and ``ended``: the measured time; ``busy``: the client's CPU seconds."""

    sent: list[Sent]
    began: float
    ended: float
    busy: float


class Load:
    """Sends requests to a server as a pattern says."""

    def __init__(self, server: Server, content: Content, pattern: Pattern, *, pace: Answer, clock: Clock = time.perf_counter) -> None:
        """``pace``: a finished answer, from which the first cancellations estimate how long others take."""
        self._server, self._content, self._pattern = server, content, pattern
        self._requests, self._clock = Requests(content), clock
        self._first_seconds = self._token_seconds = 0.0
        self._note(pace)

    async def run(self) -> Measured:
        """Warm up, then measure, until the last answer has ended."""
        await self._phase("warm-up", self._pattern.warmup, None, self._clock())
        busy, began = time.process_time(), self._clock()
        sent = await self._phase("measured", self._pattern.requests, self._pattern.seconds, began)
        ended = max((one.answer.ended for one in sent), default=began)
        return Measured(sorted(sent, key=lambda one: one.number), began, ended, time.process_time() - busy)

    async def _phase(self, phase: str, requests: int | None, seconds: float | None, began: float) -> list[Sent]:
        sent: list[Sent] = []
        numbers = itertools.count()

        def is_over(number: int, after: float) -> bool:
            return (requests is not None and number >= requests) or (seconds is not None and after >= seconds)

        async def client() -> None:
            for number in numbers:
                if is_over(number, self._clock() - began):
                    return
                sent.append(await self._send(number, self._requests.planned(phase, number), None))

        async def one(number: int, planned: Planned, due: float) -> None:
            sent.append(await self._send(number, planned, due))

        async with asyncio.TaskGroup() as group:
            if self._pattern.rate is None:
                for _ in range(self._pattern.clients or 1):
                    group.create_task(client())
            else:
                for number, after in zip(numbers, arrivals(self._content.seed, phase, self._pattern.rate), strict=False):
                    if is_over(number, after):
                        break
                    planned = self._requests.planned(phase, number)
                    await asyncio.sleep(began + after - self._clock())
                    group.create_task(one(number, planned, began + after))
        return sent

    async def _send(self, number: int, planned: Planned, due: float | None) -> Sent:
        cancel = None
        if planned.cancel_in_stream is not None:
            whole = self._token_seconds * planned.max_tokens if planned.cancel_in_stream else self._first_seconds
            cancel = Cancel(planned.cancel_in_stream, planned.cancel_part * whole)
        path, timeout_s = PATHS[self._content.api], self._pattern.timeout_s
        answer = await stream(self._server, path, planned.body, timeout_s=timeout_s, cancel=cancel, clock=self._clock)
        self._note(answer)
        return Sent(number, planned, answer, due)

    def _note(self, answer: Answer) -> None:
        """Remember how long an answer took: the next cancellations come within such times."""
        if answer.finished and answer.content_times and answer.usage is not None:
            first, last = answer.content_times[0], answer.content_times[-1]
            self._first_seconds, self._token_seconds = first - answer.started, (last - first) / max(answer.usage.output, 1)

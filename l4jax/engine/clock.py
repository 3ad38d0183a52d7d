"""How long a burst may be, by the measured time of its rounds."""

from __future__ import annotations

import time
from collections.abc import Mapping

from l4jax.engine.results import RowOutput
from l4jax.engine.step import Results

BURST_SECONDS = 0.05
"""How long a burst may take, by the measured time of a round."""
CPU_BURST_SECONDS = 0.1
"""The same on CPUs. Preparing a burst takes 2 ms of the cores that also compute it (SmolLM2, two cores): over 3 % of shorter bursts."""
_MOST_UNMEASURED_STEPS = 1 << 10


class BurstClock:
    """Measures the time of a round. Before it is known, bursts have ``short_steps``, doubled whenever the host did not have to wait."""

    def __init__(self, platform: str, short_steps: int) -> None:
        self._burst_seconds = CPU_BURST_SECONDS if platform == "cpu" else BURST_SECONDS
        self._unmeasured_steps = short_steps
        self._round_seconds = 0.0
        self._last_read = 0.0

    @property
    def most_steps(self) -> int:
        """The most rounds that a burst may have."""
        if self._round_seconds == 0.0:
            return self._unmeasured_steps
        return max(1, int(self._burst_seconds / self._round_seconds))

    def measure(self, results: Results, outputs: Mapping[int, RowOutput], dispatched_at: float, *, waited: bool) -> None:
        """Take the time of a round from a step that has just been read and had no prefill.

        The devices began it when it was dispatched, or when they had finished the step before it. If the host did not wait for the
        results (not ``waited``), they were ready earlier, and the time is only an upper bound.
        """
        now, rounds = time.perf_counter(), 0
        if not results.prefill:
            rounds = max((output.rounds.rounds for output in outputs.values()), default=0)
            rounds = rounds or max((len(row.tokens) for row in results.burst if row is not None), default=0)
        if rounds and not waited and not self._round_seconds:
            self._unmeasured_steps = min(2 * self._unmeasured_steps, _MOST_UNMEASURED_STEPS)
        elif rounds:
            seconds = (now - max(dispatched_at, self._last_read)) / rounds
            self._round_seconds = seconds if waited else min(seconds, self._round_seconds)
        self._last_read = now

"""How long a burst may be, by the measured time of its rounds."""

from __future__ import annotations

import time
from collections.abc import Mapping

from l4jax.engine.results import RowOutput
from l4jax.engine.step import Results

BURST_SECONDS = 0.05
"""The longest that a burst takes, as far as the last one tells."""
CPU_BURST_SECONDS = 0.1
"""The same on CPUs, where preparing a burst takes the cores that compute: 2 ms of two cores for SmolLM2, so shorter ones cost over 3 %."""
_MOST = 1 << 10


class BurstClock:
    """Measures rounds. Until one is known, bursts begin with ``short_steps`` and double whenever the host did not have to wait."""

    def __init__(self, platform: str, short_steps: int) -> None:
        self._burst_seconds = CPU_BURST_SECONDS if platform == "cpu" else BURST_SECONDS
        self._steps = short_steps  # while nothing is known
        self._round_seconds = 0.0
        self._last_read = 0.0

    @property
    def most_steps(self) -> int:
        """The rounds of a burst that is not too long."""
        if self._round_seconds == 0.0:
            return self._steps
        return max(1, int(self._burst_seconds / self._round_seconds))

    def measure(self, results: Results, outputs: Mapping[int, RowOutput], begun: float, *, waited: bool) -> None:
        """Take down how long a round of a burst without a prefill took, from when the devices began it (``begun`` or later), or less.

        If the results were there before they were asked for (not ``waited``), it took no longer than this.
        """
        now, rounds = time.perf_counter(), 0
        if not results.prefill:
            rounds = max((output.rounds.rounds for output in outputs.values()), default=0)
            rounds = rounds or max((len(row.tokens) for row in results.burst if row is not None), default=0)
        if rounds and not waited and not self._round_seconds:
            self._steps = min(2 * self._steps, _MOST)
        elif rounds:
            seconds = (now - max(begun, self._last_read)) / rounds
            self._round_seconds = seconds if waited else min(seconds, self._round_seconds)
        self._last_read = now

"""Times on a device that is given work and answers later."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

LEAST, MOST = 3, 20


def repeated(dispatch: Callable[[], Any], *, budget: float) -> list[float]:
    """Seconds of each of several dispatches, every one waited for, after one that warms up and does not count.

    At least LEAST, then more up to MOST until ``budget`` seconds are over.
    """
    jax.block_until_ready(dispatch())
    seconds: list[float] = []
    while len(seconds) < LEAST or (len(seconds) < MOST and sum(seconds) < budget):
        begun = time.perf_counter()
        jax.block_until_ready(dispatch())
        seconds.append(time.perf_counter() - begun)
    return seconds


def queued(dispatch: Callable[[], Any], count: int, *, budget: float) -> list[float]:
    """Seconds of one dispatch where ``count`` are given at once and the last is waited for: what the host does is hidden."""

    def several() -> Any:
        for _ in range(count - 1):
            dispatch()
        return dispatch()

    return [seconds / count for seconds in repeated(several, budget=budget)]


def summary(seconds: list[float], per: float = 1.0) -> dict[str, Any]:
    """Median, least and most in milliseconds, divided by ``per`` things that a repetition does."""
    return {
        "ms": statistics.median(seconds) / per * 1e3,
        "least_ms": min(seconds) / per * 1e3,
        "most_ms": max(seconds) / per * 1e3,
        "repetitions": len(seconds),
    }

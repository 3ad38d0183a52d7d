"""Timing on a device that works asynchronously."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

LEAST, MOST = 3, 20


def repeated(dispatch: Callable[[], Any], *, budget: float) -> list[float]:
    """Seconds of each of several dispatches, each waited for; one dispatch before them warms up and does not count.

    There are at least LEAST dispatches, then more, up to MOST, until ``budget`` seconds are over.
    """
    jax.block_until_ready(dispatch())
    seconds: list[float] = []
    while len(seconds) < LEAST or (len(seconds) < MOST and sum(seconds) < budget):
        started = time.perf_counter()
        jax.block_until_ready(dispatch())
        seconds.append(time.perf_counter() - started)
    return seconds


def queued(dispatch: Callable[[], Any], count: int, *, budget: float) -> list[float]:
    """Seconds a dispatch if ``count`` are enqueued at once and only the last is waited for, which hides the host's work."""

    def several() -> Any:
        for _ in range(count - 1):
            dispatch()
        return dispatch()

    return [seconds / count for seconds in repeated(several, budget=budget)]


def summary(seconds: list[float], per: float = 1.0) -> dict[str, Any]:
    """Median, least and most in milliseconds, divided by ``per``, the number of calls in a repetition."""
    return {
        "ms": statistics.median(seconds) / per * 1e3,
        "least_ms": min(seconds) / per * 1e3,
        "most_ms": max(seconds) / per * 1e3,
        "repetitions": len(seconds),
    }

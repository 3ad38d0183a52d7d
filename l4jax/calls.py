"""Calls that run their requests to the end. On several hosts all processes make the same calls."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from l4jax.bar import bar_if
from l4jax.engine.engine import Engine, Handle
from l4jax.interrupts import kept_interrupts
from l4jax.request import Request
from sharding import hosts


def run(engine: Engine, requests: Sequence[Request], *, scores: bool = False, progress: bool = False) -> list[Handle]:
    """Run requests to their ends. Raises the error of the first that failed; ValueError, before anything runs, if one cannot fit."""
    with kept_interrupts() as check_interrupts, bar_if(progress) as show:
        for number, request in enumerate(requests):
            with _naming(number, len(requests)):
                engine.check(request, scores=scores)
        handles: list[Handle] = []

        def check() -> None:
            show("prompts", sum(handle.over for handle in handles), len(handles))
            check_interrupts()

        try:
            for request in requests:
                handles.append(engine.add(request, scores=scores))
            engine.run_until(lambda: all(handle.over for handle in handles), check)
        finally:
            for handle in handles:
                handle.cancel()
        check_interrupts()
    for number, handle in enumerate(handles):
        with _naming(number, len(handles)):
            if handle.error is not None:
                raise handle.error
    return handles


def agreed(requests: Sequence[Request]) -> Sequence[Request]:
    """The requests with process 0's seeds. Raises ValueError if anything but the seeds differs between processes."""
    if hosts.process_count() > 1:
        asked = repr([(list(request.token_ids), request.params) for request in requests])
        same = {"what is asked for": hashlib.sha256(asked.encode()).hexdigest()}
        hosts.check_same(same, "call every process with the same prompts and sampling params")
    seeds: list[int] = json.loads(hosts.share(json.dumps([request.seed for request in requests]))[0])
    return [dataclasses.replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]


@contextmanager
def _naming(number: int, count: int) -> Iterator[None]:
    """If there are several prompts, say in a ValueError which one it is about."""
    try:
        yield
    except ValueError as error:
        if count == 1:
            raise
        raise ValueError(f"prompt {number} of {count}, counted from 0: {error}") from error

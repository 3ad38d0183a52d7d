"""Calls that run their requests to the end. On several hosts all processes make the same calls."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import deque
from collections.abc import Sequence

from l4jax.arguments import of_each_prompt, truth
from l4jax.bar import bar_if
from l4jax.engine.engine import Engine
from l4jax.engine.handle import Handle
from l4jax.interrupts import kept_interrupts
from l4jax.request import Request
from sharding import hosts
from sharding.kinds import shown
from sharding.words import counted

_SAME_CALLS = "call every process with the same prompts and sampling params"


def run[H: Handle](engine: Engine, requests: Sequence[Request], kind: type[H], *, progress: bool = False) -> list[H]:
    """Run requests to their ends. Raises the error of the first that failed; ValueError, before anything runs, if one cannot fit."""
    with kept_interrupts() as check_interrupts, bar_if(truth("progress", progress)) as show:
        of_each_prompt(functools.partial(engine.check, kind=kind), requests)
        handles: list[H] = []
        waiting: deque[H] = deque()  # those that may not be over; the ones that are over are dropped from the front

        def all_over() -> bool:
            while waiting and waiting[0].over:
                waiting.popleft()
            return not waiting

        def check() -> None:
            if progress:
                show("prompts", sum(handle.over for handle in handles), len(handles))
            check_interrupts()

        try:
            for request in requests:
                handles.append(engine.add(request, kind))
            waiting.extend(handles)
            engine.run_until(all_over, check)
        finally:
            for handle in handles:
                handle.cancel()
        check_interrupts()
    of_each_prompt(_check_ended_well, handles)
    return handles


def _check_ended_well(handle: Handle) -> None:
    if handle.error is not None:
        raise handle.error


def agreed(requests: Sequence[Request]) -> Sequence[Request]:
    """The requests with process 0's seeds. Raises ValueError, which says what differs, if anything but the seeds does."""
    if hosts.process_count() == 1:
        return requests
    hosts.check_same({"the number of prompts": str(len(requests))}, _SAME_CALLS)
    asked = [_digest((list(request.token_ids), request.params)) for request in requests]
    every = [json.loads(text) for text in hosts.share(json.dumps([asked, [request.seed for request in requests]]))]
    for number, request in enumerate(requests):
        if any(others[number] != asked[number] for others, _ in every):
            hosts.check_same(_described(number, request), _SAME_CALLS)
    return [dataclasses.replace(request, seed=seed) for request, seed in zip(requests, every[0][1], strict=True)]


def _described(number: int, request: Request) -> dict[str, str]:
    """All that a request is made of but its seed, in words that differ where it does."""
    prompt = f"prompt {number}, counted from 0,"
    fields = {f"{name} of {prompt}": value for name, value in vars(request.params).items()}
    texts = {name: repr(value) if len(repr(value)) < 60 else f"{shown(value)} (digest {_digest(value)})" for name, value in fields.items()}
    return {prompt: f"{counted(len(request.token_ids), 'token')} (digest {_digest(list(request.token_ids))})", **texts}


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()

"""Checks guides before the engine gets them, in processes that are stopped if one takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections import OrderedDict

import msgspec

from l4jax.decoding.guide import Guide
from l4jax.serving import errors
from l4jax.serving.errors import ApiError
from l4jax.serving.messages import LENGTH_BYTES

CHECK_SECONDS = 5.0
"""How long a guide may take."""
_WORKERS = 2
_MOST_WAITING = 64
_START_SECONDS = 60.0
LOGGER = logging.getLogger("l4jax.serving")
_KEPT_CHARACTERS = 1 << 20
"""What is known of guides is kept up to this many characters of their texts together."""


class GuideChecker:
    """Says whether guides can be followed. Its processes are started when they are first needed, and end with this one."""

    def __init__(self) -> None:
        self._room = asyncio.Semaphore(_WORKERS)
        self._waiting = 0
        self._idle: list[asyncio.subprocess.Process] = []
        self._known: OrderedDict[Guide, str] = OrderedDict()
        self._kept_characters = 0

    async def check(self, guide: Guide, parameter: str) -> None:
        """Raise ApiError, which names the parameter, for a guide that cannot be followed, or takes too long to tell."""
        why = self._known.get(guide)
        if why is None:
            why = await self._asked(guide)
        else:
            self._known.move_to_end(guide)
        if why:
            # Clients call it by its parameter.
            why = why.replace("the guide's ", "its ")
            raise ApiError(f"{parameter}: {why}", param=parameter, code="invalid_value")

    async def _asked(self, guide: Guide) -> str:
        if self._waiting == _MOST_WAITING:
            raise ApiError(
                f"{_MOST_WAITING} other requests wait for their schemas or grammars to be checked; try again in a second",
                status=429,
                kind="rate_limit_error",
                code="queue_full",
                headers={"retry-after": "1"},
            )
        self._waiting += 1
        try:
            async with self._room:
                try:
                    why = await self._told(guide)
                except TimeoutError:
                    return f"it takes more than {CHECK_SECONDS:.0f} s to prepare; make it simpler"
                except (asyncio.IncompleteReadError, ConnectionError):
                    return "it takes too much memory to prepare; make it simpler"
        finally:
            self._waiting -= 1
        # What failed for want of time or memory is not kept: the machine may only have been busy.
        if guide not in self._known:
            self._known[guide] = why
            self._kept_characters += len(guide.text)
            while self._kept_characters > _KEPT_CHARACTERS:
                dropped, _ = self._known.popitem(last=False)
                self._kept_characters -= len(dropped.text)
        return why

    async def _told(self, guide: Guide) -> str:
        """What a process says of the guide. One that does not answer, or is not waited for to the end, is killed."""
        worker = None
        while worker is None and self._idle:
            worker = self._idle.pop()
            if worker.returncode is not None:
                worker = None  # it was killed meanwhile
        if worker is None:
            worker = await _started()
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                why = await _answer(worker, guide)
        except BaseException:
            _kill(worker)
            raise
        self._idle.append(worker)
        return why


async def _started() -> asyncio.subprocess.Process:
    program = [sys.executable, "-P", "-m", "l4jax.serving.guide_worker"]
    worker = await asyncio.create_subprocess_exec(*program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(_START_SECONDS):
            await _answer(worker, Guide.json())  # when it has loaded its libraries
    except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
        _kill(worker)
        LOGGER.error("a process that checks schemas and grammars does not start")
        raise errors.failed("the server cannot check schemas and grammars now; make the request again later") from error
    except BaseException:
        _kill(worker)
        raise
    return worker


async def _answer(worker: asyncio.subprocess.Process, guide: Guide) -> str:
    assert worker.stdin is not None and worker.stdout is not None
    asked = msgspec.msgpack.encode(guide)
    worker.stdin.write(len(asked).to_bytes(LENGTH_BYTES, "big") + asked)
    length = int.from_bytes(await worker.stdout.readexactly(LENGTH_BYTES), "big")
    return (await worker.stdout.readexactly(length)).decode()


def _kill(worker: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.kill()

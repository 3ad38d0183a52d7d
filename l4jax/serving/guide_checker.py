"""Checks guides before the engine gets them, in processes that are stopped if one takes too long."""

from __future__ import annotations

import asyncio
import contextlib
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
_KEPT_CHARACTERS = 1 << 20
"""What is known of guides is kept up to this many characters of their texts together."""


class GuideChecker:
    """Says whether guides can be followed. Its processes are started when they are first needed, and end with this one."""

    def __init__(self) -> None:
        self._room = asyncio.Semaphore(_WORKERS)
        self._waiting = 0
        self._idle: list[asyncio.subprocess.Process] = []
        self._known: OrderedDict[Guide, str] = OrderedDict()

    async def check(self, guide: Guide, parameter: str) -> None:
        """Raise ApiError, which names the parameter, for a guide that cannot be followed, or takes too long to tell."""
        why = self._known.get(guide)
        if why is None:
            why = await self._asked(guide)
            self._known[guide] = why
            while sum(len(known.text) for known in self._known) > _KEPT_CHARACTERS:
                self._known.popitem(last=False)
        self._known.move_to_end(guide)
        if why:
            raise ApiError(f"{parameter}: {why}", param=parameter, code="invalid_value")

    async def _asked(self, guide: Guide) -> str:
        if self._waiting == _MOST_WAITING:
            raise errors.queue_full(1, 0)
        self._waiting += 1
        try:
            async with self._room:
                worker = self._idle.pop() if self._idle else await _started()
                try:
                    async with asyncio.timeout(CHECK_SECONDS):
                        why = await _answer(worker, guide)
                except TimeoutError:
                    _kill(worker)
                    return f"it takes more than {CHECK_SECONDS:.0f} s to prepare; make it simpler"
                except (asyncio.IncompleteReadError, ConnectionError):
                    _kill(worker)
                    return "it takes too much memory to prepare; make it simpler"
                except BaseException:
                    _kill(worker)  # its client has gone, and its answer would be taken for the next one's
                    raise
                self._idle.append(worker)
                return why
        finally:
            self._waiting -= 1


async def _started() -> asyncio.subprocess.Process:
    program = [sys.executable, "-P", "-m", "l4jax.serving.guide_worker"]
    worker = await asyncio.create_subprocess_exec(*program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    await _answer(worker, Guide.json())  # when it has loaded its libraries
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

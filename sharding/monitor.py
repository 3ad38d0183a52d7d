"""A process that watches over one process of several, and ends it with a message when another one has died.

:func:`sharding.hosts.join` runs it as a program of its own, which needs only the standard library: JAX aborts a process whose
coordinator is gone, a dead peer leaves a collective waiting for ever, and a thread would wait for Python's lock. This program
outlives all three.

The watched process holds the other end of standard input: it sends a line of JSON with the settings and a word when it ends; the pipe
closes when it dies. Each monitor talks over TCP to that of process 0, which tells all of them who died first, and who is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEAT_SECONDS = 2.0
"""How often two monitors say that they are alive."""

SILENCE_SECONDS = 15.0
"""A host that has been silent for this long counts as dead."""

GRACE_SECONDS = 3.0
"""How long a process may take to end by itself, with a message of its own, before it is killed."""

DONE, FAILED = "done", "failed"
"""The watched process's last word: it has finished, or it ends with an error that it has shown."""

DRIFTED = "drifted"
"""Begins the last word of a process that computes something else than process 0; the reason follows."""

READY = "ready"
"""What a monitor tells its process once it is connected: process 0's monitor to all others, any other monitor to process 0's."""

_ALONE = "alone"
"""What process 0's monitor tells process 0 once the other processes have ended, so that process 0 may end too."""
_DIED = "died"
"""The last word of a process that died before it could say one of those."""
_BEAT = "alive"
"""What two monitors send each other every ``BEAT_SECONDS``."""
_STOPPED, _CONTINUED = "stopped", "continued"
"""Whether the watched process is suspended: it is alive, and all others wait for it."""


@dataclass(frozen=True)
class Settings:
    """What a monitor is told. ``hosts``: the host of each process. ``worker``: the system's id of the watched process. ``address`` and
    ``port`` are those of process 0's monitor; ``token`` keeps strangers out.
    """

    process_id: int
    hosts: list[str]
    worker: int
    token: str
    address: str = ""
    port: int = 0


class Monitor:
    """One process's monitor. Its verdict is the first process that died, and how; or None when all are done."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._verdict: asyncio.Future[tuple[int, str] | None] = asyncio.get_running_loop().create_future()
        self._last_word = ""
        self._gone = asyncio.Event()
        self._peers: dict[int, asyncio.StreamWriter] = {}
        self._done: set[int] = set()

    async def run(self, worker: asyncio.StreamReader, listener: socket.socket | None) -> None:
        """Watch until every process is done, or until this one must end because of another. Process 0's monitor has the ``listener``."""
        watching = [self._watch_worker(worker), self._beat()]
        server = None
        if listener is None:
            watching.append(self._follow())
        else:
            self._tell_when_ready()
            server = await asyncio.start_server(self._hear_process, sock=listener)
        tasks = [asyncio.create_task(task) for task in watching]
        verdict = await self._verdict
        if verdict is not None:
            await self._end(*verdict)
        for task in tasks:
            task.cancel()
        for peer in self._peers.values():
            peer.close()
        if server is not None:
            server.close()

    async def _watch_worker(self, worker: asyncio.StreamReader) -> None:
        self._last_word = (await worker.readline()).decode().strip() or _DIED
        await self._report(self._last_word)
        await worker.read()
        self._gone.set()
        if self._last_word == DONE:
            # Processes leave once all are done. The last words of the others may still be on their way: without them this one has died.
            await asyncio.sleep(GRACE_SECONDS)
            await self._report(_DIED)

    async def _report(self, word: str) -> None:
        """Tell process 0's monitor."""
        if self._settings.process_id == 0:
            await self._heard(0, word)
        elif 0 in self._peers:
            await _send(self._peers[0], word)

    async def _hear_process(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """As process 0's monitor: listen to another's."""
        token, _, process = (await _line(reader) or "").partition(" ")
        if token == self._settings.token:
            process_id = int(process)
            self._peers[process_id] = writer
            self._tell_when_ready()
            while word := await _line(reader):
                if word != _BEAT:
                    await self._heard(process_id, word)
            del self._peers[process_id]
            await self._heard(process_id, _DIED)
        writer.close()

    def _tell_when_ready(self) -> None:
        if len(self._peers) == len(self._settings.hosts) - 1:
            _tell(READY)

    async def _heard(self, process_id: int, word: str) -> None:
        """As process 0's monitor: take in what one process's monitor says."""
        if word in (_STOPPED, _CONTINUED):
            self._notice(process_id, word)
            for peer in list(self._peers.values()):
                await _send(peer, f"{process_id} {word}")
            return
        if word == DONE:
            self._done.add(process_id)
        all_done = len(self._done) == len(self._settings.hosts)
        if (word != DONE or all_done) and not self._verdict.done():
            self._verdict.set_result(None if all_done else (process_id, word))

    async def _follow(self) -> None:
        """As another's monitor: talk to process 0's."""
        address, port = self._settings.address, self._settings.port
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(address, port), SILENCE_SECONDS)
        except OSError as error:  # includes a timeout
            _tell(f"process 0's monitor at {address}:{port} cannot be reached ({error or 'no answer'})")
            self._verdict.set_result(None)
            return
        await _send(writer, f"{self._settings.token} {self._settings.process_id}")
        self._peers[0] = writer
        _tell(READY)
        if self._last_word:
            await _send(writer, self._last_word)
        while word := await _line(reader):
            first, _, how = word.partition(" ")
            if how in (_STOPPED, _CONTINUED):
                self._notice(int(first), how)
            elif word != _BEAT:
                break
        first, _, how = (word or f"0 {_DIED}").partition(" ")
        # Process 0's monitor leaves silently once all are done.
        all_done = word is None and self._last_word == DONE
        self._verdict.set_result(None if all_done else (int(first), how))

    def _notice(self, process_id: int, word: str) -> None:
        where = f"process {process_id} (host {self._settings.hosts[process_id]})"
        if word == _STOPPED:
            _warn(f"{where} is stopped, by Ctrl-Z, SIGSTOP or a debugger, and the others wait for it; continue it (kill -CONT) or end it")
        else:
            _warn(f"{where} continues")

    async def _beat(self) -> None:
        seen = reported = _CONTINUED
        while True:
            before, seen = seen, _STOPPED if _is_stopped(self._settings.worker) else _CONTINUED
            if before == seen != reported:
                reported = seen
                await self._report(seen)
            for peer in list(self._peers.values()):
                await _send(peer, _BEAT)
            await asyncio.sleep(BEAT_SECONDS)

    async def _end(self, first: int, how: str) -> None:
        """End the process, with a message unless it has shown one. Process 0 ends last: JAX aborts the others when it ends."""
        me, hosts = self._settings.process_id, self._settings.hosts
        started = time.monotonic()
        if me == 0:
            for peer in list(self._peers.values()):
                await _send(peer, f"{first} {how}")
            while self._peers and time.monotonic() < started + 2 * GRACE_SECONDS:
                await asyncio.sleep(0.02)
            _tell(_ALONE)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), max(1.0, started + GRACE_SECONDS - time.monotonic()))
        word, _, reason = how.partition(" ")
        if word == DRIFTED:
            _warn(
                f"error: process {first} (host {hosts[first]}) has drifted from process 0 (host {hosts[0]}): {reason}; every process must "
                "make the same calls with the same arguments; if they do, this is a fault of l4jax: please report it; "
                f"process {me} (host {hosts[me]}) stops"
            )
        elif first != me and self._last_word != FAILED:
            what = "died" if how == _DIED else "stopped with an error"
            _warn(f"error: process {first} (host {hosts[first]}) {what}; process {me} (host {hosts[me]}) stops")
        if not self._gone.is_set():
            os.kill(self._settings.worker, signal.SIGKILL)


async def _line(reader: asyncio.StreamReader) -> str | None:
    """The next line; None if the connection has ended or is silent."""
    try:
        return (await asyncio.wait_for(reader.readline(), SILENCE_SECONDS)).decode().strip() or None
    except (OSError, ValueError):  # a timeout is an OSError; a line that is too long or not text is a ValueError
        return None


def _is_stopped(process: int) -> bool:
    """Whether a process is suspended; only Linux says so."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    # "pid (name) state ...", where the name may have brackets of its own.
    return status.rpartition(") ")[2][:1] in ("T", "t")


def _warn(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"l4jax: {line}", file=sys.stderr, flush=True)


def _tell(line: str) -> None:
    """Tell the watched process."""
    with contextlib.suppress(OSError):  # it is dead
        print(line, flush=True)


async def _send(writer: asyncio.StreamWriter, line: str) -> None:
    with contextlib.suppress(OSError):  # the task that reads the connection notices that it is broken
        writer.write(f"{line}\n".encode())
        await asyncio.wait_for(writer.drain(), BEAT_SECONDS)


def listen(port: int) -> socket.socket:
    """A socket that listens on all of this host's addresses; 0 takes a free port. Raises OSError if the port is in use."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


async def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the watched process, whose end is noticed
    worker = asyncio.StreamReader(limit=1 << 24)  # the settings name every host
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(worker), sys.stdin)
    listener = None
    if sys.argv[1:] == ["--listen"]:
        listener = listen(0)
        _tell(str(listener.getsockname()[1]))
    line = await worker.readline()
    if line:
        settings: dict[str, Any] = json.loads(line)
        await Monitor(Settings(**settings)).run(worker, listener)
    sys.stderr.flush()
    os._exit(0)  # without waiting for open connections


if __name__ == "__main__":
    asyncio.run(_main())

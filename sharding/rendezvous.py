"""How processes meet before they join: process 0 checks every arrival, and refuses those that it does not expect.

JAX ends every process of a running job when another one comes with a process id that is in use, and never names the cause when processes
were started with different counts. So process 0 listens at the coordinator's address itself. An arrival sends one line of JSON with its
process id, host and count, and gets one line back: once all have come, the port of JAX's coordinator; or why it is refused. Process 0
listens as long as it lives, so later arrivals are refused and disturb nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from sharding.monitor import listen
from sharding.words import counted

_GREETING_SECONDS = 10.0
"""How long an arrival may take to say who it is."""
_PROBE_SECONDS = 1.0
"""How long process 0 looks for another process 0."""


@dataclass(frozen=True)
class Arrival:
    """What a process says of itself; ``processes``: how many it was told there are."""

    process_id: int
    host: str
    processes: int


class Refused(ValueError):
    """Process 0 does not let this process in; the message says why."""


class Rendezvous:
    """Process 0's side, which serves in a thread of its own until it is closed.

    ``port``: where JAX's coordinator is to listen; picked when all have come, for it is free until JAX takes it. Raises OSError if this
    side cannot listen on ``coordinator_port``.
    """

    def __init__(self, own: Arrival, coordinator_port: int) -> None:
        listener = listen(coordinator_port)
        self.port = 0
        self._processes = own.processes
        self._hosts = {own.process_id: own.host}
        self._refusals: list[str] = []
        self._answer: dict[str, int | str] = {}
        self._complete = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._decided, self._closing = asyncio.Event(), asyncio.Event()
        self._check_complete()
        self._thread = threading.Thread(target=self._run, args=[listener], daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Wait until all have come. Otherwise closes, and raises TimeoutError with the ids that are missing and the arrivals refused."""
        if self._complete.wait(seconds):
            return
        missing = ", ".join(str(i) for i in range(self._processes) if i not in self._hosts)
        refused = "".join(f"; refused: {line}" for line in self._refusals)
        message = (
            f"{counted(self._processes, 'process was', 'processes were')} expected, and after {seconds:g} s these had not come: "
            f"{missing}{refused}; start every one, with the same coordinator and number of processes and a process id of its own"
        )
        self._answer = {"refused": message}
        self.close()
        raise TimeoutError(message)

    def close(self) -> None:
        """Stop listening, and answer those that still wait."""
        with contextlib.suppress(RuntimeError):  # closed before
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _run(self, listener: socket.socket) -> None:
        self._loop.run_until_complete(self._serve(listener))
        self._loop.close()

    async def _serve(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._receive, sock=listener)
        await self._closing.wait()
        server.close()
        self._decided.set()
        visits = asyncio.all_tasks() - {asyncio.current_task()}
        if visits:
            await asyncio.wait(visits, timeout=1.0)
        for visit in visits:
            visit.cancel()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # a stranger, or one that has gone
            arrival = Arrival(**json.loads(await asyncio.wait_for(reader.readline(), _GREETING_SECONDS)))
            refusal = self._refusal(arrival)
            if refusal is not None:
                self._refusals.append(refusal)
                writer.write(_line({"refused": refusal}))
            else:
                self._hosts[arrival.process_id] = arrival.host
                self._check_complete()
                gone, decided = asyncio.create_task(reader.read()), asyncio.create_task(self._decided.wait())
                await asyncio.wait([gone, decided], return_when=asyncio.FIRST_COMPLETED)
                gone.cancel()
                decided.cancel()
                if self._decided.is_set():
                    writer.write(_line(self._answer))
                else:  # it may be started again
                    del self._hosts[arrival.process_id]
            await writer.drain()
        writer.close()

    def _refusal(self, arrival: Arrival) -> str | None:
        process_id = arrival.process_id
        if arrival.processes != self._processes or not 0 <= process_id < self._processes:
            return (
                f"process 0 (host {self._hosts[0]}) was started as one of {counted(self._processes, 'process', 'processes')}, and process "
                f"{process_id} (host {arrival.host}) as one of {arrival.processes}; start every process with the same number of processes"
            )
        if process_id in self._hosts:
            return (
                f"process id {process_id} is in use on host {self._hosts[process_id]}, and a second process (host {arrival.host}) was "
                "started with it; give each process an id of its own, and each job a coordinator of its own"
            )
        return None

    def _check_complete(self) -> None:
        if len(self._hosts) == self._processes:
            with listen(0) as free:
                self.port = free.getsockname()[1]
            self._answer = {"port": self.port}
            self._decided.set()
            self._complete.set()


def check_in(own: Arrival, host: str, port: int, seconds: float) -> int:
    """Another process's side: wait until all have come, and return the port of JAX's coordinator.

    Raises :class:`Refused`; TimeoutError if process 0 has not let this process in after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=5.0) as connection:
                return _port(_ask(own, connection, deadline), host, port)
        except OSError as error:
            problem = str(error)
        if time.monotonic() >= deadline:
            raise TimeoutError(
                f"the coordinator {host}:{port} did not answer for {seconds:g} s ({problem}); expected process 0 there; check the address, "
                "that process 0 runs, and that no firewall is between"
            )
        time.sleep(0.2)


def check_alone(own: Arrival, host: str, port: int) -> None:
    """For process 0, before it listens. Raises :class:`Refused` if another process 0 is there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=_PROBE_SECONDS) as connection:
        _port(_ask(own, connection, time.monotonic() + _PROBE_SECONDS), host, port)


def _ask(own: Arrival, connection: socket.socket, deadline: float) -> bytes:
    """What process 0 answers. Raises OSError if it does not."""
    connection.sendall(_line(asdict(own)))
    reply = b""
    while not reply.endswith(b"\n"):
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            part = connection.recv(1 << 16)
        except TimeoutError as error:
            raise TimeoutError("something listens there, and has let nobody in") from error
        if not part:
            raise ConnectionError("it closed the connection")
        reply += part
    return reply


def _port(reply: bytes, host: str, port: int) -> int:
    try:
        answer = json.loads(reply)
        if "refused" not in answer:
            return int(answer["port"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Refused(f"another program listens at {host}:{port}, where process 0 was expected; choose another port") from error
    raise Refused(str(answer["refused"]))


def _line(values: Mapping[str, int | str]) -> bytes:
    return json.dumps(dict(values)).encode() + b"\n"

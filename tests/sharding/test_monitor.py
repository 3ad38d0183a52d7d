"""The monitors of several processes, without the processes: who is told what, and who is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess

import pytest

from sharding import monitor
from sharding.monitor import DONE, FAILED, Monitor, Settings

TOKEN = "secret"


@pytest.fixture(autouse=True)
def killed(monkeypatch):
    """Record kills instead of sending signals (the workers do not exist), and make all times a tenth of the real ones."""
    pids = []
    monkeypatch.setattr(os, "kill", lambda pid, number: pids.append((pid, number)))
    for name in ("BEAT_SECONDS", "SILENCE_SECONDS", "GRACE_SECONDS"):
        monkeypatch.setattr(monitor, name, getattr(monitor, name) / 10)
    return pids


class Group:
    """Monitors of processes on hosts a, b and c, whose workers speak through their ``words``."""

    def __init__(self, watched, workers):
        self.workers = workers
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.words = {i: asyncio.StreamReader() for i in watched}
        self.tasks = []
        self.opened = []

    async def connect(self, line):
        """A connection of somebody else's."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.opened.append(writer)
        writer.write(line + b"\n")
        return reader

    def start(self):
        for i, words in self.words.items():
            settings = Settings(i, ["a", "b", "c"], worker=self.workers.get(i, 100 + i), token=TOKEN, address="127.0.0.1", port=self.port)
            self.tasks.append(asyncio.create_task(Monitor(settings).run(words, self.listener if i == 0 else None)))

    def say(self, process, word):
        self.words[process].feed_data(f"{word}\n".encode())

    async def end(self):
        await asyncio.wait_for(asyncio.gather(*self.tasks), 5)
        self.listener.close()
        for writer in self.opened:
            writer.close()
        await asyncio.sleep(0.1)


def run(scenario, watched=(0, 1, 2), workers=None):
    async def started():
        group = Group(watched, workers or {})
        group.start()
        await asyncio.sleep(0.1)
        await scenario(group)
        await group.end()

    asyncio.run(started())


def stops(died, how, *others):
    hosts = "abc"
    return {f"l4jax: error: process {died} (host {hosts[died]}) {how}; process {i} (host {hosts[i]}) stops" for i in others}


def test_when_all_are_done_nothing_is_said(capfd, killed):
    async def scenario(group):
        for process in (1, 0, 2):
            group.say(process, DONE)

    run(scenario)
    assert capfd.readouterr() == ("ready\n" * 3, "") and not killed


def test_a_process_that_leaves_the_others_is_named(capfd, killed):
    """It said that all was well, and JAX gave up waiting for the others, which keep running."""

    async def scenario(group):
        group.say(1, DONE)
        group.words[1].feed_eof()

    run(scenario)
    assert set(capfd.readouterr().err.splitlines()) == stops(1, "died", 0, 2)
    assert set(killed) == {(100, signal.SIGKILL), (102, signal.SIGKILL)}


def test_nobody_is_ready_before_all_have_come(capfd, killed):
    async def scenario(group):
        assert capfd.readouterr().out == "ready\n"  # that of 1, which has reached 0
        await group.connect(f"{TOKEN} 2".encode())
        await asyncio.sleep(0.05)
        assert capfd.readouterr().out == "ready\n"
        group.say(0, FAILED)
        group.words[0].feed_eof()

    run(scenario, watched=(0, 1))


@pytest.mark.parametrize("died", [0, 1])
def test_a_death_is_told_to_all_others(died, capfd, killed):
    async def scenario(group):
        group.words[died].feed_eof()

    run(scenario)
    others = {0, 1, 2} - {died}
    assert set(capfd.readouterr().err.splitlines()) == stops(died, "died", *others)
    assert set(killed) == {(100 + i, signal.SIGKILL) for i in others}


def test_a_death_is_told_when_others_are_done(capfd, killed):
    async def scenario(group):
        group.say(2, DONE)
        await asyncio.sleep(0.05)
        group.words[1].feed_eof()

    run(scenario)
    assert set(capfd.readouterr().err.splitlines()) == stops(1, "died", 0, 2)
    assert set(killed) == {(100, signal.SIGKILL), (102, signal.SIGKILL)}


def test_the_first_to_go_is_named_and_who_has_shown_an_error_is_silent(capfd, killed):
    """Process 2 fails, whereupon 0 dies of it."""

    async def scenario(group):
        group.say(2, FAILED)
        group.words[2].feed_eof()
        await asyncio.sleep(0.1)
        group.words[0].feed_eof()

    run(scenario)
    assert set(capfd.readouterr().err.splitlines()) == stops(2, "stopped with an error", 0, 1)
    assert killed == [(101, signal.SIGKILL)]


def test_a_host_that_falls_silent_is_taken_for_dead(capfd, killed):
    async def scenario(group):
        await group.connect(f"{TOKEN} 1".encode())

    run(scenario, watched=(0, 2))
    assert set(capfd.readouterr().err.splitlines()) == stops(1, "died", 0, 2)
    assert set(killed) == {(100, signal.SIGKILL), (102, signal.SIGKILL)}


def test_strangers_are_shown_the_door(capfd, killed):
    async def scenario(group):
        for greeting in (b"GET / HTTP/1.1", b"another 1", b"x" * 200_000, b"\xff\xfe"):
            stranger = await group.connect(greeting)
            with contextlib.suppress(ConnectionResetError):  # there was more to read
                assert await stranger.read() == b""
        for process in (0, 1, 2):
            group.say(process, DONE)

    run(scenario)
    assert capfd.readouterr() == ("ready\n" * 3, "") and not killed


def test_where_process_0_cannot_be_reached_nobody_is_killed(capfd, killed):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = Settings(1, ["a", "b"], worker=101, token=TOKEN, address="127.0.0.1", port=port)

    async def alone():
        await asyncio.wait_for(Monitor(settings).run(asyncio.StreamReader(), None), 5)

    asyncio.run(alone())
    out, errors = capfd.readouterr()
    assert out.startswith(f"process 0's monitor at 127.0.0.1:{port} cannot be reached (") and errors == "" and not killed


def test_a_process_that_is_stopped_is_named_once_to_all_and_nobody_is_killed(capfd, killed):
    with subprocess.Popen(["sh", "-c", "kill -STOP $$; sleep 60"]) as stopped:

        async def scenario(group):
            await said(capfd, 3, "is stopped, by Ctrl-Z, SIGSTOP or a debugger, and the others wait for it; continue it")
            subprocess.run(["kill", "-CONT", str(stopped.pid)], check=True)
            await said(capfd, 3, "continues")
            for process in (0, 1, 2):
                group.say(process, DONE)

        try:
            run(scenario, workers={1: stopped.pid})
        finally:
            subprocess.run(["kill", "-KILL", str(stopped.pid)], check=True)
    assert capfd.readouterr().err == "" and not killed


async def said(capfd, times, what):
    """Wait until this many monitors have said this of process 1, and nothing else."""
    lines = []
    async with asyncio.timeout(5):
        while len(lines) < times:
            await asyncio.sleep(0.05)
            lines += capfd.readouterr().err.splitlines()
    assert all(line.startswith(f"l4jax: process 1 (host b) {what}") for line in lines)

"""What ends one half of a server ends the other, and clients are told."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import tiny
from tests.serving.running import SLOTS, events, running, start

LONG = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True, "stream": True}
CHAT = "/v1/chat/completions"


def is_running(pid: int) -> bool:
    """Whether a process is there, and not just waiting for its parent to ask how it ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def stream_with_paused_engine(server):
    """Begin a stream, then pause the engine process. Returns the connection and the response."""
    connection, response = server.open("POST", CHAT, LONG)
    response.read(10)
    os.kill(server.engine_pid, signal.SIGSTOP)
    return connection, response


def test_a_killed_engine_ends_streams_with_an_error_and_the_server(checkpoint):
    with running(checkpoint) as server:
        connection, response = stream_with_paused_engine(server)
        os.kill(server.engine_pid, signal.SIGKILL)
        with contextlib.closing(connection):
            *_, last = events(response.read().decode())
        assert last["error"]["code"] == "engine_error"
        assert server.process.wait(60) == 1


def test_a_killed_front_ends_the_engine(checkpoint):
    with running(checkpoint) as server:
        engine = server.engine_pid
        assert is_running(engine)
        server.process.kill()
        server.process.wait(60)
        for _ in range(100):
            if not is_running(engine):
                break
            time.sleep(0.1)
        assert not is_running(engine)


def test_a_paused_engine_is_not_ready_and_a_server_drains_before_it_ends(checkpoint):
    with running(checkpoint, "--stalled-seconds", "1", "--drain-seconds", "60") as server:
        connection, response = stream_with_paused_engine(server)
        time.sleep(1.5)
        assert (server.answer("/health")[0], server.answer("/ready")[0]) == (200, 503)
        os.kill(server.engine_pid, signal.SIGCONT)
        with contextlib.closing(connection):
            assert events(response.read().decode())[-1] == "[DONE]"
        assert server.answer("/ready")[0] == 200
        connection, response = stream_with_paused_engine(server)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(ConnectionRefusedError):
            server.answer("/health")
        os.kill(server.engine_pid, signal.SIGCONT)
        with contextlib.closing(connection):
            assert events(response.read().decode())[-1] == "[DONE]"
        assert server.process.wait(60) == 0


def test_requests_that_outlast_the_drain_end_with_an_error(checkpoint):
    with running(checkpoint, "--drain-seconds", "1") as server:
        connection, response = stream_with_paused_engine(server)
        server.process.send_signal(signal.SIGTERM)
        with contextlib.closing(connection):
            *_, last = events(response.read().decode())
        assert "being stopped" in last["error"]["message"]
        assert server.process.wait(60) == 0


def test_a_second_signal_stops_the_server_at_once(checkpoint):
    with running(checkpoint) as server:
        connection, _ = stream_with_paused_engine(server)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        connection.close()


def test_more_requests_than_may_wait_are_refused(checkpoint):
    with running(checkpoint, "--max-waiting", "1") as server:
        status, answer = server.answer(CHAT, {**LONG, "stream": False, "n": SLOTS + 2})
        assert status == 400 and f"expected at most {SLOTS + 1}" in answer["error"]["message"]
        connection, _ = stream_with_paused_engine(server)
        held = [server.send("POST", CHAT, LONG) for _ in range(SLOTS)]
        time.sleep(0.5)
        last, refusal = server.open("POST", CHAT, LONG)
        assert refusal.status == 429 and refusal.headers["retry-after"] == "1"
        os.kill(server.engine_pid, signal.SIGCONT)
        for one in (connection, last, *held):
            one.close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--kv-tokens", "128", "--max-model-len", "256"), "cannot hold one request"),
        (("--max-model-len", "1025"), "expected 2 to 1024"),
        (("--mesh", "tensor=3"), "tensor"),
        (("--port", "70000"), "expected 0 to 65535"),
        (("--slots", "0"), "--slots is 0"),
        (("--host", "nowhere.invalid"), "--host is nowhere.invalid"),
        (("--api-key", "ä"), "printable ASCII"),
        (("--log", "/nowhere/log"), "choose another file"),
        (("--log-texts",), "needs --log"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(checkpoint, options, expected):
    process = start(checkpoint, "--port", "0", *options)
    _, error = process.communicate(timeout=180)
    assert process.returncode == 2
    assert error.startswith("l4jax: error: ") and error.count("\n") == 1 and expected in error


def test_a_port_in_use_and_a_missing_tokenizer_are_refused(checkpoint, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as used:
        taken = start(checkpoint, "--port", str(used.getsockname()[1]))
        assert "in use" in taken.communicate(timeout=180)[1] and taken.returncode == 2
    without = start(tiny.save(tmp_path, tiny.shallow(tiny.llama3_like())), "--port", "0")
    assert "no tokenizer" in without.communicate(timeout=180)[1] and without.returncode == 2


def test_the_front_imports_no_jax():
    program = "import l4jax.serving.front, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "uvicorn" in loaded and not {"jax", "jaxlib", "flax", "orbax"} & set(loaded)

"""How processes meet: who is let in, and what the others are told."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sharding.rendezvous import Arrival, Refused, Rendezvous, check_alone, check_in

HOSTS = "abcd"


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def three(port: int) -> Iterator[Rendezvous]:
    """Process 0 of three, on host a."""
    rendezvous = Rendezvous(Arrival(0, "a", 3), port)
    yield rendezvous
    rendezvous.close()


def arrive(process_id: int, port: int, *, processes: int = 3, host: str = "", seconds: float = 20.0) -> int:
    return check_in(Arrival(process_id, host or HOSTS[process_id], processes), "127.0.0.1", port, seconds)


class Waiting:
    """An arrival that waits in a thread."""

    def __init__(self, call: Callable[[], int]) -> None:
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result: int | Exception = self._call()
        except Exception as error:
            self._result = error

    def result(self) -> int | Exception:
        self._thread.join()
        return self._result


def test_all_are_told_the_port_once_all_have_come_and_whoever_comes_later_is_refused(three: Rendezvous, port: int) -> None:
    first = Waiting(lambda: arrive(1, port))
    assert arrive(2, port) == three.port == first.result()
    three.wait(20.0)
    for late in (1, 2):
        with pytest.raises(
            Refused, match=rf"^process id {late} is in use on host {HOSTS[late]}, and a second process \(host d\) was started "
        ):
            arrive(late, port, host="d")
    with pytest.raises(Refused, match=r"^process id 0 is in use on host a, and a second process \(host d\) was started with it; give each"):
        check_alone(Arrival(0, "d", 3), "127.0.0.1", port)


def test_a_port_that_was_taken_while_process_0_waited_is_not_given(three: Rendezvous, port: int) -> None:
    with socket.create_server(("", three.port)) as other:
        first = Waiting(lambda: arrive(1, port))
        assert arrive(2, port) == first.result() != other.getsockname()[1]


def test_another_number_of_processes_is_named(three: Rendezvous, port: int) -> None:
    message = (
        r"process 0 \(host a\) was started as one of 3 processes, and process 1 \(host b\) as one of 2; start every process with the same "
        "number of processes"
    )
    with pytest.raises(Refused, match=f"^{message}$"):
        arrive(1, port, processes=2)
    waiting = Waiting(lambda: arrive(2, port))
    told = rf"3 processes were expected, and after 0\.5 s these had not come: 1; refused: {message}; start every one, with the same "
    with pytest.raises(TimeoutError, match=f"^{told}"):
        three.wait(0.5)
    refused = waiting.result()  # process 0 tells those that wait
    assert isinstance(refused, Refused) and str(refused).startswith("3 processes were expected, and after 0.5 s these had not come: 1")


def test_one_that_left_before_all_had_come_may_come_again(three: Rendezvous, port: int) -> None:
    with pytest.raises(TimeoutError, match=r"did not answer for 0\.2 s \(something listens there, and has let nobody in\)"):
        arrive(1, port, seconds=0.2)
    time.sleep(0.1)  # process 0 sees that it has gone
    waiting = [Waiting(lambda i=i: arrive(i, port)) for i in (1, 2)]
    three.wait(20.0)
    assert [one.result() for one in waiting] == [three.port] * 2


def test_strangers_change_nothing(three: Rendezvous, port: int, caplog: pytest.LogCaptureFixture) -> None:
    for greeting in (
        b"GET / HTTP/1.1\r\n",
        b"\xff\xfe\n",
        b"[1]\n",
        b'{"process_id": "1", "host": "x", "processes": 3}\n',
        b"x" * 200_000,
        b"[" * 60_000 + b"\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(greeting)
            stranger.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(1) == b""  # it has been dealt with
    waiting = [Waiting(lambda i=i: arrive(i, port)) for i in (1, 2)]
    assert [one.result() for one in waiting] == [three.port] * 2
    assert caplog.text == ""


def test_another_program_at_the_coordinator_s_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(
            Refused, match=rf"^another program listens at 127\.0\.0\.1:{port}, where process 0 was expected; choose another"
        ):
            arrive(1, port)
        thread.join()

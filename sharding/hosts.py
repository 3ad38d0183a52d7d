"""Many processes as one program: they join, agree before anything is compiled, and end together.

This builds on JAX's distributed runtime. Each process runs the same program on its own devices, and a mesh spans the devices of all.
Without :func:`join` there is one process, and every function here returns at once.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import operator
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import jax

# JAX has no public access to the key-value store of its coordinator.
from jax._src.distributed import global_state

from sharding import monitor
from sharding.kinds import is_number, is_whole, shown
from sharding.rendezvous import Arrival, Rendezvous, check_alone, check_in
from sharding.words import counted

_EXCHANGE_SECONDS = 3600
"""How long a process waits for another's text: the other may have to read its weights from a slow disk first."""
_BEHIND_SECONDS = 60
"""How long process 0 waits for one that is too many texts behind."""
_APART_SECONDS = 30
"""A process that waits in another call than process 0 ends the job after twice this time, unless one of its threads makes that call."""
_BLOCK = 64
"""How many texts are deleted together, once all processes have read them."""
# When JAX's own timeout expires, JAX aborts the process. Ours expires first and raises an exception.
_NEVER_SECONDS = 10**6
_COORDINATOR = "HOST:PORT of process 0, as in gpu-01:8476, or auto"


Channel = Literal["meeting", "calls", "programs"]
"""What :func:`share` is for. Threads of a process may share different things in any order."""


class _Exchanges:
    """What this process has shared on one channel: how often, and the thread that did so last."""

    def __init__(self) -> None:
        self.count = 0
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()


@dataclasses.dataclass
class _Group:
    """The processes that have joined: each one's host, this one's monitor if there are others, and the counts of exchanged texts."""

    hosts: list[str]
    monitor: subprocess.Popen[str] | None = None
    exchanges: dict[Channel, _Exchanges] = dataclasses.field(default_factory=lambda: {name: _Exchanges() for name in get_args(Channel)})
    broadcasts: list[Broadcast] = dataclasses.field(default_factory=list)

    def named(self, process: int) -> str:
        """A process and its host, which is not known before all have met."""
        return f"process {process} (host {self.hosts[process]})" if process < len(self.hosts) else f"process {process}"


def join(coordinator: str, processes: int | None = None, process_id: int | None = None, *, timeout_seconds: float = 300) -> None:
    """Make this process one of several, before JAX is used for anything else.

    ``coordinator``: ``"HOST:PORT"``, where process 0 will listen, with the number of ``processes`` and this one's ``process_id``
    (from 0); or ``"auto"``, to take all three from Slurm, Kubernetes or MPI as ``jax.distributed.initialize`` does.

    When a process dies, the others end with a message that names it and its host. Raises ValueError for arguments that do not fit
    together and for a process that process 0 refuses; TimeoutError if not all processes have come after ``timeout_seconds``, or do not
    reach each other within as long again; OSError if this process's monitor does not start or cannot reach the others; and
    ``jax.errors.JaxRuntimeError`` if JAX's own connections fail.
    """
    if global_state.client is not None:
        raise ValueError("this process has already joined the others; expected one call, before anything else uses JAX")
    if os.getpid() == 1:
        raise ValueError(
            "this process is number 1 of its container, which nothing inside can end when another process dies; start the container with "
            "an init process (docker run --init, or shareProcessNamespace: true in a pod)"
        )
    timeout_seconds = _waiting_time(timeout_seconds)
    arguments = _join_arguments(coordinator, processes, process_id, timeout_seconds)
    # The service would catch SIGTERM, to save checkpoints during training.
    jax.config.update("jax_enable_preemption_service", False)

    def meet() -> None:
        _initialize(arguments)
        _group.hosts = share(socket.gethostname(), "meeting")
        _start_monitor()

    if coordinator == "auto":
        refusal = (
            f"not all processes had joined after {timeout_seconds:g} s (coordinator auto); check that the launcher started every one, and "
            "that all ports are open between the hosts"
        )
    else:
        refusal = (
            f"all processes ({processes}) came to the coordinator {coordinator}, and within {timeout_seconds:g} s more they did not reach "
            f"each other on other ports (JAX's coordinator is at {arguments['coordinator_address']}); open all ports between the hosts, "
            "and see that every process still runs"
        )
    _call_within(timeout_seconds, meet, refusal)


def process_count() -> int:
    """How many processes run this program together."""
    return int(global_state.num_processes)


def process_id() -> int:
    """This process's number, from 0."""
    return int(global_state.process_id)


def share(value: str, channel: Channel = "calls") -> list[str]:
    """Every process's value, by process id. All processes must share equally often, and in the same order, on each channel.

    Raises RuntimeError if another thread shares on the channel now: the other processes' threads might come in another order.
    TimeoutError names a process that has not come after an hour.
    """
    client = global_state.client
    if client is None:
        return [value]
    own = _group.exchanges[channel]
    if not own.lock.acquire(blocking=False):
        raise RuntimeError("another thread is in a call that all processes make together; on several hosts make these from one thread")
    try:
        exchange, own.thread = own.count, threading.current_thread()
        client.key_value_set(f"l4jax/{channel}/{exchange}/{process_id()}", value)
        own.count += 1
        values = [_wait_for(f"l4jax/{channel}/{exchange}/{i}", i, _EXCHANGE_SECONDS, _unread) for i in range(process_count())]
        # A process that has set a value in this exchange has read all values of the one before.
        client.key_value_delete(f"l4jax/{channel}/{exchange - 1}/{process_id()}")
        return values
    finally:
        own.lock.release()


class Broadcast:
    """Texts from process 0 to all others, which read them in order. All processes must construct their broadcasts in the same order.

    Process 0 sends a text in 0.2 ms. It waits only for a process that has more than 64 texts left to read.
    """

    def __init__(self) -> None:
        self._name = f"l4jax/broadcast {len(_group.broadcasts)}"
        self._count = 0
        self._reader: threading.Thread | None = None
        _group.broadcasts.append(self)

    def send(self, text: str) -> None:
        """As process 0: send the next text. TimeoutError names a process that stays more than 64 texts behind for a minute."""
        block, place = divmod(self._count, _BLOCK)
        if place == 0 and block > 1:
            for other in range(1, process_count()):
                _wait_for(f"{self._name}/read/{block - 2}/{other}", other, _BEHIND_SECONDS)
            _client().key_value_delete(f"{self._name}/sent/{block - 2}")
            _client().key_value_delete(f"{self._name}/read/{block - 2}")
        _client().key_value_set(self.next_key, text)
        self._count += 1

    def receive(self) -> str:
        """As another process: wait for the next text."""
        self._reader = threading.current_thread()
        text = _wait_for(self.next_key, 0, _EXCHANGE_SECONDS, _exchange_begun)
        block, place = divmod(self._count, _BLOCK)
        self._count += 1
        if place == _BLOCK - 1:
            _client().key_value_set(f"{self._name}/read/{block}/{process_id()}", "all")
        return text

    @property
    def next_key(self) -> str:
        """Where the next text is, or will be."""
        block, place = divmod(self._count, _BLOCK)
        return f"{self._name}/sent/{block}/{place}"

    @property
    def read_here(self) -> bool:
        """Whether no other thread than this one reads the texts."""
        return _is_no_others(self._reader)


_group = _Group([socket.gethostname()])


def check_same(values: Mapping[str, str], advice: str) -> None:
    """Raise ValueError in every process unless all have the same ``values``; the message names the first key whose values differ."""
    if process_count() > 1 and _group.monitor is None:
        raise ValueError(
            "the processes were joined by jax.distributed.initialize, so nothing would end them together; call l4jax.join instead"
        )
    every: list[dict[str, str]] = [json.loads(text) for text in share(json.dumps(dict(values)))]
    for other in range(1, len(every)):
        for name in values:
            if every[0].get(name) != every[other].get(name):
                raise ValueError(
                    f"{name} differs between processes: {_group.named(0)} has {every[0].get(name)}, "
                    f"{_group.named(other)} has {every[other].get(name)}; {advice}"
                )


def hold(error: BaseException) -> None:
    """Delay an error of JAX's runtime: if another process's death has caused it, the monitor meanwhile says so and ends this process."""
    # A failed collective raises either; its message starts with the status, as in "UNKNOWN: ...".
    of_runtime = isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and re.match("[A-Z_]+: ", str(error)))
    if of_runtime and _group.monitor is not None:
        time.sleep(monitor.SILENCE_SECONDS + monitor.GRACE_SECONDS)


def end_with_error(status: int) -> None:
    """End all processes, after this one has shown an error. Returns if this is the only process."""
    if global_state.client is None and global_state.service is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if _group.monitor is not None:
        _tell_monitor(monitor.FAILED)
        if process_id() == 0:  # JAX aborts the others when process 0 ends, so they are given time to end first
            with contextlib.suppress(OSError):
                _read_monitor()
    os._exit(status)  # JAX would wait for the others


def end_drifted(reason: str) -> NoReturn:
    """End all processes, because this one (not process 0) has noticed that it does not do what process 0 does; each prints one line."""
    sys.stdout.flush()
    sys.stderr.flush()
    _tell_monitor(f"{monitor.DRIFTED} {reason}")
    os._exit(1)


def _client() -> Any:
    assert global_state.client is not None
    return global_state.client


def _wait_for(key: str, process: int, seconds: float, other_call: Callable[[], str | None] = lambda: None) -> str:
    """Wait for a value that a process sets in the coordinator's store. Raises TimeoutError, naming the process, if it does not.

    ``other_call``: returns a key that shows that process 0 is in another call, which this thread would have to make; if it returns the
    same key twice, the job ends.
    """
    deadline, before = time.monotonic() + seconds, None
    while True:
        try:
            return str(_client().blocking_key_value_get(key, _APART_SECONDS * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{_group.named(process)} has kept {_group.named(process_id())} waiting for {seconds} s; every process must make the same "
                "calls in the same order, and read its streams equally often"
            )
        before, last = other_call(), before
        if before is not None and before == last and not _is_set(key):
            end_drifted(f"for more than {_APART_SECONDS} s it has been in another call of l4jax")


def _is_no_others(thread: threading.Thread | None) -> bool:
    """Whether what this thread has done last falls to the current one now."""
    return thread is None or not thread.is_alive() or thread is threading.current_thread()


def _is_set(key: str) -> bool:
    try:
        _client().key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return False
    return True


def _unread() -> str | None:
    """The key of a broadcast text that this thread, which waits in :func:`share`, has not read. Another thread may read it yet."""
    others = [] if process_id() == 0 else [each for each in _group.broadcasts if each.read_here]
    return next((each.next_key for each in others if _is_set(each.next_key)), None)


def _exchange_begun() -> str | None:
    """The key of process 0's value in a call of :func:`share` that this thread, which waits for a broadcast, has not made.

    Another thread may make it yet.
    """
    made_here = [(name, own.count) for name, own in _group.exchanges.items() if _is_no_others(own.thread)]
    return next((key for key in (f"l4jax/{name}/{count}/0" for name, count in made_here) if _is_set(key)), None)


def _waiting_time(timeout_seconds: float) -> float:
    if not is_number(timeout_seconds) or not 0 < timeout_seconds <= threading.TIMEOUT_MAX:
        raise ValueError(f"timeout_seconds is {shown(timeout_seconds)}; expected a number above 0, at most {threading.TIMEOUT_MAX:g}")
    return float(timeout_seconds)


def _join_arguments(coordinator: str, processes: int | None, process_id: int | None, timeout_seconds: float) -> dict[str, Any]:
    """Check the arguments of :func:`join`; returns those of ``jax.distributed.initialize``, none if the coordinator is "auto"."""
    if not isinstance(coordinator, str):
        raise ValueError(f"the coordinator is {shown(coordinator)}; expected {_COORDINATOR}")
    for what, number in (("number of processes", processes), ("process id", process_id)):
        # What a launcher sets in the environment is text.
        if number is not None and not is_whole(number):
            raise ValueError(f"the {what} is {shown(number)}; expected a whole number")
    if coordinator == "auto":
        if processes is not None or process_id is not None:
            raise ValueError("the coordinator is auto, which finds the number of processes and the process id too; leave both out")
        return {}
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 1 <= int(port) <= 65535:
        raise ValueError(f"the coordinator is {shown(coordinator)}; expected {_COORDINATOR}")
    if processes is None or process_id is None:
        missing = "number of processes" if processes is None else "process id"
        raise ValueError(
            f"the coordinator is {coordinator} and the {missing} is missing; give both the number of processes and the process id"
        )
    if processes < 1 or not 0 <= process_id < processes:
        raise ValueError(
            f"process id {process_id} of {counted(processes, 'process', 'processes')}; expected an id from 0 to one less than their number"
        )
    processes, process_id = operator.index(processes), operator.index(process_id)  # as JSON and JAX take them
    own = Arrival(process_id, socket.gethostname(), processes)
    return {
        "coordinator_address": f"{host}:{_meet(own, host.strip('[]'), int(port), timeout_seconds)}",
        "num_processes": processes,
        "process_id": process_id,
        # Otherwise Slurm's variables would leave each process one device only.
        "cluster_detection_method": "deactivate",
    }


def _meet(own: Arrival, host: str, port: int, timeout_seconds: float) -> int:
    """Wait until all processes have come, and return the port of JAX's coordinator."""
    if own.process_id > 0:
        return check_in(own, host, port, timeout_seconds)
    check_alone(own, host, port)
    try:
        rendezvous = Rendezvous(own, port)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port} of the coordinator {host}:{port} ({error}); choose another port"
        ) from error
    rendezvous.wait(timeout_seconds)
    return rendezvous.port


def _initialize(arguments: dict[str, Any]) -> None:
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=_NEVER_SECONDS)
    except (ValueError, RuntimeError) as error:
        # Errors of the runtime are RuntimeErrors too.
        if arguments or isinstance(error, jax.errors.JaxRuntimeError):
            raise
        raise ValueError(
            f"the coordinator is auto, and could not be found from a Slurm, Kubernetes or MPI job ({error}); give HOST:PORT of process 0, "
            "the number of processes and the process id"
        ) from error


def _call_within(seconds: float, call: Callable[[], None], refusal: str) -> None:
    """Make a call in a thread of its own. If it takes longer, raises TimeoutError and leaves the thread waiting."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(refusal)
    if errors:
        raise errors[0]


def _start_monitor() -> None:
    """Start this process's monitor, and wait until it is connected to the others'."""
    first = process_id() == 0
    command = [sys.executable, "-I", str(Path(monitor.__file__)), *(["--listen"] if first else [])]
    _group.monitor = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    listening = _read_monitor() if first else ""
    port, token = share(f"{listening} {secrets.token_hex()}" if first else "", "meeting")[0].split()
    assert global_state.coordinator_address is not None
    settings = monitor.Settings(
        process_id=process_id(),
        hosts=_group.hosts,
        worker=os.getpid(),
        token=token,
        address=global_state.coordinator_address.rpartition(":")[0].strip("[]"),
        port=int(port),
    )
    _tell_monitor(json.dumps(vars(settings)))
    answer = _read_monitor()
    if answer != monitor.READY:
        raise OSError(f"{answer}; open the ports between the hosts")
    atexit.register(_say_farewell)
    _hold_errors()


def _read_monitor() -> str:
    """The next line from this process's monitor."""
    assert _group.monitor is not None and _group.monitor.stdout is not None
    line = _group.monitor.stdout.readline().strip()
    if not line:
        raise OSError("the process that watches this one did not start; its message is above")
    return line


def _say_farewell() -> None:
    _tell_monitor(monitor.FAILED if getattr(sys, "last_exc", None) is not None else monitor.DONE)


def _tell_monitor(line: str) -> None:
    assert _group.monitor is not None and _group.monitor.stdin is not None
    with contextlib.suppress(OSError):  # it has ended
        print(line, file=_group.monitor.stdin, flush=True)


def _hold_errors() -> None:
    show = sys.excepthook

    def hold_and_show(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        hold(error)
        show(kind, error, traceback)

    sys.excepthook = hold_and_show

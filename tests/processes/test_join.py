"""Processes join: what they are asked with, how they find each other, and how long they wait."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time

import numpy as np
import pytest

import l4jax
from sharding import hosts
from tests.processes.start import ends, generate, one_line, start


def test_processes_that_nobody_watches_are_refused(monkeypatch):
    monkeypatch.setattr(hosts.global_state, "num_processes", 2)  # as jax.distributed.initialize leaves it
    with pytest.raises(ValueError, match=r"joined by jax\.distributed\.initialize, .*; call l4jax\.join instead"):
        hosts.check_same({}, "")


def test_number_1_of_a_container_is_refused(monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(ValueError, match="nothing inside can end when another process dies; start the container with an init process"):
        l4jax.join("127.0.0.1:8476", 2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8476, 2, 0), "the coordinator is 8476; expected HOST:PORT of process 0, as in gpu-01:8476, or auto"),
        (("gpu-01", 2, 0), "the coordinator is 'gpu-01'; expected HOST:PORT"),
        (("gpu-01:8476", "2", 0), "the number of processes is '2'; expected a whole number"),
        (("gpu-01:8476", 2, "0"), "the process id is '0'; expected a whole number"),
        (("gpu-01:8476", True, 0), "the number of processes is True; expected a whole number"),
        (("gpu-01:8476", 2, False), "the process id is False; expected a whole number"),
        (("gpu-01:8476", np.int64(2), np.int64(2)), "process id 2 of 2 processes; expected an id from 0"),
        (("gpu-01:8476", 2, 2), "process id 2 of 2 processes; expected an id from 0"),
    ],
)
def test_what_cannot_be_joined_is_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
        l4jax.join(*arguments)


@pytest.mark.parametrize("seconds", ["300", 0, float("nan"), float("inf"), True])
def test_a_time_that_nobody_can_wait_is_refused(seconds):
    with pytest.raises(ValueError, match=f"^timeout_seconds is {seconds!r}; expected a number above 0"):
        l4jax.join("gpu-01:8476", 2, 0, timeout_seconds=seconds)


def test_where_the_others_are_cannot_be_found(checkpoint, monkeypatch):
    """Open MPI 5, without the package that JAX asks it with."""
    for name, value in {"RANK": "0", "SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    ((status, _, errors),) = ends([start(generate(checkpoint, "--coordinator", "auto", "--coordinator-timeout", 30))], 60)
    assert status == 2 and "the coordinator is auto, and could not be found from a Slurm, Kubernetes or MPI job (" in one_line(errors)


@pytest.mark.parametrize("given", [{"processes": 2}, {"process_id": 0}])
def test_numbers_given_together_with_auto_are_refused(given):
    with pytest.raises(
        ValueError, match=r"^the coordinator is auto, which finds the number of processes and the process id too; leave both"
    ):
        l4jax.join("auto", **given)


def test_slurm_says_where_the_others_are(monkeypatch):
    """As JAX reads it: the port is made of the job's number."""
    script = """
import l4jax
from sharding import hosts
l4jax.join("auto", timeout_seconds=60)
print(hosts.process_id(), hosts.process_count(), hosts.share(str(hosts.process_id())))
"""
    processes = []
    for i in range(2):
        variables = {"JOB_ID": str(os.getpid()), "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": str(i), "LOCALID": str(i)}
        for name, value in variables.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        processes.append(start([sys.executable, "-c", script]))
    for i, (status, out, errors) in enumerate(ends(processes, 60)):
        assert (status, out) == (0, f"{i} 2 ['0', '1']\n"), errors


@pytest.mark.parametrize(
    ("process_id", "message"),
    [
        (1, r"did not answer for 0\.3 s \(\[Errno 111\] Connection refused\); expected process 0 there; check"),
        (0, r"2 processes were expected, and after 0\.3 s these had not come: 1; start every one"),
    ],
)
def test_waiting_for_the_others_has_an_end(process_id, message, port):
    with pytest.raises(TimeoutError, match=message):
        l4jax.join(f"127.0.0.1:{port}", 2, process_id, timeout_seconds=0.3)


def test_closed_ports_are_told_from_processes_that_did_not_come(port, monkeypatch):
    monkeypatch.setattr(hosts, "_initialize", lambda arguments: threading.Event().wait())
    message = (
        rf"^all processes \(1\) came to the coordinator 127\.0\.0\.1:{port}, and within 0\.2 s more they did not reach each other on other "
        r"ports \(JAX's coordinator is at 127\.0\.0\.1:\d+\); open all ports between the hosts, and see that every process still runs$"
    )
    with pytest.raises(TimeoutError, match=message):
        l4jax.join(f"127.0.0.1:{port}", 1, 0, timeout_seconds=0.2)
    with pytest.raises(TimeoutError, match=r"^not all processes had joined after 0\.2 s \(coordinator auto\); check that the launcher"):
        l4jax.join("auto", timeout_seconds=0.2)


def test_waiting_for_the_others_takes_nothing_off_the_time_to_reach_them(port, monkeypatch):
    def meet(*_):
        time.sleep(0.4)
        return port

    monkeypatch.setattr(hosts, "_meet", meet)
    monkeypatch.setattr(hosts, "_initialize", lambda arguments: time.sleep(0.1))
    monkeypatch.setattr(hosts, "_start_monitor", lambda: None)
    l4jax.join(f"127.0.0.1:{port}", 1, 0, timeout_seconds=0.3)


def test_numbers_to_join_with_may_be_numpys(port, monkeypatch):
    given = []
    monkeypatch.setattr(hosts, "_initialize", given.append)
    monkeypatch.setattr(hosts, "_start_monitor", lambda: None)
    l4jax.join(f"127.0.0.1:{port}", np.int64(1), np.int32(0), timeout_seconds=np.float32(5))
    (arguments,) = given
    assert type(arguments["num_processes"]) is int and type(arguments["process_id"]) is int


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"process 0 cannot listen on port {port} of the coordinator 127.0.0.1:{port} "):
            l4jax.join(f"127.0.0.1:{port}", 2, 0)

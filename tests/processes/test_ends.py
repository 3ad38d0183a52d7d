"""Several real processes over TCP end together, and say why: one dies, fails, is stopped, or does something else than the others."""

from __future__ import annotations

import json
import re
import signal
import sys

import pytest

from l4jax import cli
from sharding import hosts
from tests.processes.start import HOST, ends, generate, one_line, start, start_all, together, wait_for

# Process 1 has other free pages, shorter bursts, or is not asked for the request at all.
DRIFT = """
from l4jax import SamplingParams
from l4jax.engine import commands
from l4jax.engine.clock import BurstClock
from l4jax.engine.handle import Handle
llm = l4jax.load(checkpoint, mesh=mesh)
engine = llm.engine
scheduler, request = engine._scheduler, llm.requests.request([1, 2, 3], SamplingParams(max_tokens=100, ignore_eos=True, seed=0))
if drift == "state":
    BurstClock.most_steps = 1
free = scheduler.ranks[0].pool.full._free
if process_id == "1" and drift == "pages":
    free.reverse()
if process_id == "1" and drift == "state":  # of pages that the request does not come to
    middle = len(free) // 2
    free[middle], free[middle - 1] = free[middle - 1], free[middle]
if process_id == "1" and drift == "rounds":
    plan = scheduler.next
    scheduler.next = lambda most_steps: plan(1)
commands.ASKED_SECONDS = 1
if process_id == "0" or drift != "requests":
    engine.add(request, Handle)
while engine.step():
    pass
"""
# Each in another call.
APART = """
import time
from sharding import hosts
hosts._APART_SECONDS = 1
texts = hosts.Broadcast()
if {swapped} == int(process_id):
    hosts.share("asked")
elif process_id == "0":
    texts.send("a step")
    time.sleep(600)  # the devices wait for those of process 1
else:
    texts.receive()
"""
# Process 1 never comes, or reads nothing.
LATE = """
import time
from sharding import hosts
hosts._APART_SECONDS, hosts._EXCHANGE_SECONDS, hosts._BEHIND_SECONDS = 1, 2, 2
texts = hosts.Broadcast()
if process_id == "1":
    time.sleep(600)
elif sends:
    for i in range(200):
        texts.send(str(i))
else:
    hosts.share("asked")
"""
# One thread makes calls, in process 1 so late that it would be a drift if the thread that reads the texts made them.
THREADS = """
import json, threading, time
from sharding import hosts
hosts._APART_SECONDS = 1
texts, begun, found = hosts.Broadcast(), threading.Event(), {}
def call():
    found["first"] = hosts.share("first " + process_id)
    begun.set()
    time.sleep(5 * int(process_id))
    found["second"] = hosts.share("second " + process_id)
caller = threading.Thread(target=call)
caller.start()
begun.wait()
time.sleep(0.5)
found["program"] = hosts.share("program " + process_id, "programs")
if process_id == "0":
    try:
        hosts.share("third")
    except RuntimeError as error:
        found["refused"] = str(error)
    caller.join()
    texts.send("a step")
else:
    found["received"] = texts.receive()
    caller.join()
json.dump(found, open(results, "w"))
"""
# These two go on until they are killed.
ANSWERING = """
llm = l4jax.load(checkpoint, mesh=mesh)
for i in range(10**6):
    stream = llm.stream("the dog", l4jax.SamplingParams(max_tokens=400, seed=i, ignore_eos=True))
    next(stream)
    open(results, "w").close()
    list(stream)
"""
ENDLESS = """
import jax  # sums alone: no model is needed to see processes end
mesh = jax.make_mesh((int(processes),), ("x",))
sum = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P()))
x = jax.make_array_from_callback((int(processes),), jax.NamedSharding(mesh, jax.P("x")), lambda _: jax.numpy.ones(1))
while True:
    sum(x).block_until_ready()
    open(results, "w").close()
"""


def assert_all_name(victim, outcomes):
    for i, (status, _, errors) in enumerate(outcomes):
        assert status != 0
        if i != victim:  # JAX's stack trace, when process 0 has died, may come before or after
            assert f"l4jax: error: process {victim} (host {HOST}) died; process {i} (host {HOST}) stops" in errors.splitlines()


def test_a_job_outlives_strangers_names_who_is_stopped_and_ends_with_the_host_of_who_is_killed(checkpoint, port, tmp_path):
    files = [tmp_path / str(i) for i in range(3)]
    processes = start_all(ENDLESS, 3, "", "", port, files=files)
    wait_for(files, processes)
    # Started by mistake: with an id that is in use, and with another number of processes.
    mistakes = [start(generate(checkpoint, *together(port, 1, processes=n))) for n in (3, 2)]
    messages = (
        f"process id 1 is in use on host {HOST}, and a second process (host {HOST}) was started with it; give each process an id of its "
        "own, and each job a coordinator of its own",
        f"process 0 (host {HOST}) was started as one of 3 processes, and process 1 (host {HOST}) as one of 2; start every process with the "
        "same number of processes",
    )
    for (status, out, errors), message in zip(ends(mistakes, 60), messages, strict=True):
        assert (status, out, errors) == (2, "", f"l4jax: error: {message}\n")
    for file in files:
        file.unlink()
    wait_for(files, processes)  # the job continues
    processes[1].send_signal(signal.SIGSTOP)
    for i in (0, 2):
        line = processes[i].stderr.readline()
        while "Gloo" in line:
            line = processes[i].stderr.readline()
        assert line.startswith(f"l4jax: process 1 (host {HOST}) is stopped, by Ctrl-Z, SIGSTOP or a debugger, and the others wait for it")
    processes[1].send_signal(signal.SIGKILL)
    assert_all_name(1, ends(processes, 30))


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_two_is_killed_while_they_answer_the_other_ends_and_names_its_host(talking, port, tmp_path, victim):
    files = [tmp_path / str(i) for i in range(2)]
    processes = start_all(ANSWERING, 2, talking, "sequence=2", port, files=files)
    wait_for(files, processes)
    processes[victim].send_signal(signal.SIGKILL)
    assert_all_name(victim, ends(processes, 30))


@pytest.mark.parametrize(
    ("drift", "reason"),
    [
        ("state", "its scheduler has another state in iteration 64"),
        ("pages", r"it would dispatch another step in iteration 1"),
        ("rounds", r"it would dispatch another step in iteration \d"),
        ("requests", "for 1 s it has not been asked for request 1"),
    ],
)
def test_a_drifted_job_ends_and_both_hosts_are_named(talking, port, tmp_path, drift, reason):
    processes = start_all(f"drift = {drift!r}\n" + DRIFT, 2, talking, "sequence=2", port, files=[tmp_path / str(i) for i in range(2)])
    assert_drifted(ends(processes, 120), reason)


def assert_drifted(outcomes, reason):
    process = [f"process {i} (host {HOST})" for i in range(2)]
    advice = "every process must make the same calls with the same arguments; if they do, this is a fault of l4jax: please report it; "
    for i, (status, _, errors) in enumerate(outcomes):
        (line,) = (line for line in errors.splitlines() if line.startswith("l4jax: error: "))
        assert status != 0 and "Traceback" not in errors
        beginning, ending = f"l4jax: error: {process[1]} has drifted from {process[0]}: ", f"; {advice}{process[i]} stops"
        assert line.startswith(beginning) and line.endswith(ending)
        assert re.fullmatch(reason, line[len(beginning) : -len(ending)])


@pytest.mark.parametrize("swapped", [0, 1])
def test_processes_in_different_calls_end(port, tmp_path, swapped):
    processes = start_all(APART.format(swapped=swapped), 2, "", "", port, files=[tmp_path / str(i) for i in range(2)])
    assert_drifted(ends(processes, 60), "for more than 1 s it has been in another call of l4jax")


@pytest.mark.parametrize("sends", [False, True])
def test_one_that_keeps_process_0_waiting_is_named(port, tmp_path, sends):
    processes = start_all(f"sends = {sends}\n" + LATE, 2, "", "", port, files=[tmp_path / str(i) for i in range(2)])
    first, second = ends(processes, 60)
    assert first[0] != 0 and second[0] != 0
    advice = "every process must make the same calls in the same order, and read its streams equally often"
    line = f"process 1 (host {HOST}) has kept process 0 (host {HOST}) waiting for 2 s; {advice}"
    assert first[2].strip().splitlines()[-1] == f"TimeoutError: {line}"
    assert one_line(second[2]) == f"l4jax: error: process 0 (host {HOST}) stopped with an error; process 1 (host {HOST}) stops"


def test_a_thread_that_is_late_with_its_call_is_no_drift(port, tmp_path):
    """While another thread reads what process 0 sends; and what programs share waits for neither."""
    files = [tmp_path / str(i) for i in range(2)]
    for status, _, errors in ends(start_all(THREADS, 2, "", "", port, files=files), 60):
        assert status == 0, errors
    first, second = (json.loads(file.read_text()) for file in files)
    shared = {f"{name}": [f"{name} 0", f"{name} 1"] for name in ("first", "second", "program")}
    refused = "another thread is in a call that all processes make together; on several hosts make these from one thread"
    assert first == {**shared, "refused": refused} and second == {**shared, "received": "a step"}


def test_an_uncaught_exception_in_one_ends_the_others(port):
    script = """
import sys
import l4jax
from sharding import hosts
l4jax.join(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]), timeout_seconds=60)
if sys.argv[2] == "1":
    raise KeyError("mine")
hosts.share("for ever")
"""
    first, second = ends([start([sys.executable, "-c", script, str(port), str(i)]) for i in range(2)], 60)
    assert second[0] != 0 and "KeyError: 'mine'" in second[2]
    assert first[0] != 0
    assert one_line(first[2]) == f"l4jax: error: process 1 (host {HOST}) stopped with an error; process 0 (host {HOST}) stops"


def test_an_error_of_the_runtime_waits_for_the_news_of_a_death(monkeypatch, capsys):
    """A failed collective is not this process's own error: who has died is told first."""
    waited = []
    monkeypatch.setattr(hosts._group, "monitor", object())
    monkeypatch.setattr(hosts.time, "sleep", waited.append)

    def fail(_):
        raise ValueError(message)

    monkeypatch.setattr("l4jax.cli.demo.run", fail)
    for message, waits in (("UNKNOWN: Gloo all-reduce failed", True), ("temperature is -1", False)):
        assert cli.main(["demo"]) == 2 and bool(waited) == waits
        assert capsys.readouterr().err == f"l4jax: error: {message}\n"
        waited.clear()


def test_an_error_in_one_ends_the_others(checkpoint, port, tmp_path):
    folders = checkpoint, tmp_path / "nowhere"
    good, bad = ends([start(generate(folder, *together(port, i))) for i, folder in enumerate(folders)], 60)
    assert bad[0] == 2 and one_line(bad[2]).startswith(f"l4jax: error: {folders[1]} does not exist")
    assert good[0] != 0
    assert one_line(good[2]) == f"l4jax: error: process 1 (host {HOST}) stopped with an error; process 0 (host {HOST}) stops"

"""Several real processes over TCP: one model, the tokens of one process, one end."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import l4jax
from l4jax import SamplingParams, cli, load
from l4jax.checkpoints.convert import convert
from sharding import hosts
from tests.text import small
from tests.tiny import llama3_like, save, shallow

GOLDEN = Path(__file__).parent / "golden" / "data"
HOST = socket.gethostname()
PROMPTS = [[5, 9, 2, 7, 11, 3, 1, 8, 30, 12, 6, 4, 40, 22, 17, 19, 2, 3], [7], [1, 2, 3]]
# The last has no seed: process 0 draws one for all.
PARAMS = [
    SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=12, seed=3, top_k=20, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=12, ignore_eos=True),
]

# One process of several: the checkpoint, the mesh, its number of processes, its id, the port, and where its results go.
JOIN = """
import sys
import numpy as np
import l4jax
from tests.test_many_processes import PARAMS, PROMPTS, refusals
checkpoint, mesh, processes, process_id, port, results = sys.argv[1:]
l4jax.join(f"127.0.0.1:{port}", int(processes), int(process_id), timeout_seconds=120)
"""
GENERATE = """
llm = l4jax.load(checkpoint, mesh=mesh)
completions = llm.generate(PROMPTS, PARAMS)
found = {"tokens": [c.token_ids for c in completions], "seed": np.uint64(completions[-1].seed)}
np.savez(results, logprobs=[entry.logprob for entry in completions[1].logprobs], **found)
"""
REFUSE_AND_GENERATE = """
llm = l4jax.load(checkpoint, mesh=mesh)
refused = refusals(llm, checkpoint, mesh, int(process_id))
logits = llm.logits(PROMPTS)
completions = llm.generate(PROMPTS, PARAMS)
found = {"tokens": [c.token_ids for c in completions], "seed": np.uint64(completions[-1].seed)}
np.savez(results, *logits, refused=refused, **found)
"""
# Clocks, holds, cancels and dropped streams differ: those of process 0 count.
COMMANDED = """
import json
from l4jax import SamplingParams
from l4jax.engine.clock import BurstClock
first = process_id == "0"
BurstClock.most_steps = 3 if first else 1
llm = l4jax.load(checkpoint, mesh=mesh)
engine, steps = llm.engine, []
dispatch = engine.runner.dispatch
engine.runner.is_ready_for = lambda _: first
def dispatched(step, requests):
    steps.append([step.number, step.requests, step.burst and step.burst.steps])
    return dispatch(step, requests)
engine.runner.dispatch = dispatched
params = SamplingParams(max_tokens=240, ignore_eos=True, temperature=0)
stream, dropped = llm.stream("the dog", params), llm.stream("the cat", params)
begun = next(stream) + next(dropped)
joined = llm.add([1, 2, 3], params)
while len(joined.tokens) < 5:
    llm.step()
ended = [dropped._handle, joined]
if first:
    joined.cancel()
    del dropped
rest = list(stream)
while llm.step():
    pass
found = {"text": stream.completion.text, "begun": begun, "rest": rest, "steps": steps, "iterations": engine._commands._count}
found["ended"] = [[handle.over, str(handle.error), handle.tokens] for handle in ended]
json.dump(found, open(results, "w"))
"""
# Process 1 has other free pages, shorter bursts, or is not asked for the request at all.
DRIFT = """
from l4jax import SamplingParams
from l4jax.engine import commands
from l4jax.engine.clock import BurstClock
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
    engine.add(request)
while engine.step():
    pass
"""
BROADCAST = """
import json, time
from sharding import hosts
texts, sent = hosts.Broadcast(), 300
begun = time.monotonic()
if process_id == "0":
    for i in range(sent):
        texts.send(str(i))
    found = time.monotonic() - begun
else:
    time.sleep(2)  # process 0 waits before it is 128 texts ahead
    found = [texts.receive() for _ in range(sent)]
hosts.share("all have sent and read")
kept = [key for key, _ in hosts._client().key_value_dir_get("l4jax/broadcast 0/")]
json.dump([found, len(kept)], open(results, "w"))
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


def refusals(llm, checkpoint, mesh, process_id):
    """Ask each process for something else, and return the error messages that it gets; it can continue after each of them."""
    calls = (
        lambda: load([checkpoint, checkpoint + "_other"][process_id], mesh=mesh),
        lambda: load(checkpoint, mesh=[mesh, "data=4"][process_id]),
        lambda: load(checkpoint, mesh=mesh, dtype=[None, "bfloat16"][process_id]),
        lambda: load(checkpoint, mesh="tensor=1"),
        lambda: llm.generate([[1, 2 + process_id]]),
    )
    messages = []
    for call in calls:
        with pytest.raises(ValueError, match=r"expected|start every process|call every process") as refused:
            call()
        messages.append(str(refused.value))
    return messages


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two layers of a small Scout, one with RoPE and one without: each process compiles its programs for itself."""
    folder = tmp_path_factory.mktemp("many")
    config = json.loads((GOLDEN / "scout" / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "moe_layers": [0, 1], **{name: config[name][2:4] for name in ("no_rope_layers", "layer_types")}}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(GOLDEN / "scout" / "model.safetensors")
    kept = {re.sub(r"layers\.([23])\.", lambda layer: f"layers.{int(layer[1]) - 2}.", name): name for name in tensors}
    save_file({new: tensors[old] for new, old in kept.items() if new != old or "layers." not in old}, folder / "model.safetensors")
    convert(folder, folder / "scout")
    shutil.copytree(folder / "scout", folder / "scout_other")
    manifest = folder / "scout_other" / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace('"source_format": "', '"source_format": "another '))
    return folder / "scout"


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A shallow dense model with a tokenizer."""
    tokenizer = small.backend()
    config = shallow(llama3_like(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=512))
    return save(tmp_path_factory.mktemp("talking"), config, {"tokenizer.json": tokenizer.to_str()})


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(command, devices=1, stdin=subprocess.DEVNULL):
    """A process with this many devices of its own."""
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # every process compiles; LLVM's optimisations are not what is tested
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def start_all(script, processes, *arguments, files, devices=1):
    """``script`` in every process, with its own id and file."""
    checkpoint, mesh, port = map(str, arguments)
    return [
        start([sys.executable, "-c", JOIN + script, checkpoint, mesh, str(processes), str(i), port, str(file)], devices)
        for i, file in enumerate(files)
    ]


def ends(processes, seconds):
    """What every process wrote and its status, once all have ended."""
    deadline = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=deadline - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def of_one_process(checkpoint, results):
    """The model in this process, and its completions with the seed that the processes have drawn."""
    llm = load(checkpoint)
    (seed,) = {int(result["seed"]) for result in results}
    return llm, llm.generate(PROMPTS, [*PARAMS[:2], dataclasses.replace(PARAMS[2], seed=seed)])


def test_two_processes_refuse_what_they_differ_in_and_give_the_logits_and_tokens_of_one(checkpoint, port, tmp_path):
    files = [tmp_path / f"{i}.npz" for i in range(2)]
    mesh = "sequence=2,tensor=2"
    for status, _, errors in ends(start_all(REFUSE_AND_GENERATE, 2, checkpoint, mesh, port, files=files, devices=2), 300):
        assert status == 0, errors
    every = [np.load(file) for file in files]
    llm, completions = of_one_process(checkpoint, every)
    different = ("the checkpoint's digest", "the mesh", "dtype", "what is asked for")
    expected = [f"{name} differs between processes: process 0 (host {HOST}) has " for name in different]
    expected.insert(3, "mesh tensor=1 has 1 device, and 4 cpu devices are present in 2 processes; expected all of them")
    for results in every:
        for i, logits in enumerate(llm.logits(PROMPTS)):
            assert np.abs(results[f"arr_{i}"] - logits).max() < 1e-5 * np.abs(logits).max()
        assert results["tokens"].tolist() == [c.token_ids for c in completions]
        for refused, beginning in zip(results["refused"], expected, strict=True):
            assert refused.startswith(beginning) and "\n" not in refused


def test_four_processes_give_the_tokens_of_one(checkpoint, port, tmp_path):
    files = [tmp_path / f"{i}.npz" for i in range(4)]
    for status, _, errors in ends(start_all(GENERATE, 4, checkpoint, "data=2,expert=2", port, files=files), 300):
        assert status == 0, errors
    every = [np.load(file) for file in files]
    _, completions = of_one_process(checkpoint, every)
    for results in every:
        assert results["tokens"].tolist() == [c.token_ids for c in completions]
        np.testing.assert_allclose(results["logprobs"], [entry.logprob for entry in completions[1].logprobs], atol=1e-5)


def wait_for(files, processes):
    deadline = time.monotonic() + 300
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.1)


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


def generate(checkpoint, *options):
    command = "import sys; from l4jax.cli import main; sys.exit(main())"
    return [sys.executable, "-c", command, "generate", str(checkpoint), "-p", "x", *map(str, options)]


def together(port, process_id, processes=2, timeout=60):
    return "--coordinator", f"127.0.0.1:{port}", "--processes", processes, "--process-id", process_id, "--coordinator-timeout", timeout


def test_the_command_line_prints_the_text_once(talking, port):
    """The prompt is what process 0 reads, without the newline at its end."""
    options = "--mesh", "tensor=1,sequence=2", "--max-tokens", 12, "-p", "-"
    processes = [start(generate(talking, *options, *together(port, i)), stdin=subprocess.PIPE) for i in range(2)]
    for process, text in zip(processes, ("the dog\n", ""), strict=True):
        process.stdin.write(text)
        process.stdin.close()
        process.stdin = None
    first, second = ends(processes, 300)
    assert first[0] == second[0] == 0, (first, second)
    (expected,) = load(talking).generate("the dog", SamplingParams(max_tokens=12, temperature=0.0))
    assert first[1] == f"{expected.text}\n" and "12 tokens, " in first[2]
    assert second[1] == "" and "tokens/s" not in second[2]


def test_process_0_decides_for_all(talking, port, tmp_path):
    """How long bursts are, what is held until the step before it is read, who is cancelled, and which stream is dropped."""
    files = [tmp_path / str(i) for i in range(2)]
    for status, _, errors in ends(start_all(COMMANDED, 2, talking, "sequence=2", port, files=files), 300):
        assert status == 0, errors
    first, second = (json.loads(file.read_text()) for file in files)
    assert first == second and first["iterations"] > 64  # the schedulers' states were compared
    assert {rounds for *_, rounds in first["steps"]} == {None, 3}
    (expected,) = load(talking).generate("the dog", SamplingParams(max_tokens=240, temperature=0.0, ignore_eos=True))
    assert first["text"] == expected.text and expected.text.endswith("".join(first["rest"]))
    for over, error, tokens in first["ended"]:
        assert over and error == "this request was cancelled" and len(tokens) < 60


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


def test_all_read_what_process_0_sends_and_what_was_read_is_deleted(port, tmp_path):
    files = [tmp_path / str(i) for i in range(3)]
    for status, _, errors in ends(start_all(BROADCAST, 3, "", "", port, files=files), 60):
        assert status == 0, errors
    (seconds, kept), *others = (json.loads(file.read_text()) for file in files)
    assert seconds > 1.5 and kept < 3 * 64 + 2 * 3
    for found, _ in others:
        assert found == [str(i) for i in range(300)]


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


def one_line(errors):
    """The error that a command ended with; nothing else may follow it, and only Gloo may come before."""
    *before, last = errors.strip().splitlines()
    assert all("Gloo" in line for line in before), errors
    return last


def test_different_checkpoints_end_every_command_in_one_line(checkpoint, port):
    folders = checkpoint, f"{checkpoint}_other"
    for status, out, errors in ends(
        [start(generate(folder, "--mesh", "sequence=2", *together(port, i))) for i, folder in enumerate(folders)], 60
    ):
        assert status == 2 and out == ""
        assert one_line(errors).startswith(f"l4jax: error: the checkpoint's digest differs between processes: process 0 (host {HOST}) has ")


def test_an_error_in_one_ends_the_others(checkpoint, port, tmp_path):
    folders = checkpoint, tmp_path / "nowhere"
    good, bad = ends([start(generate(folder, *together(port, i))) for i, folder in enumerate(folders)], 60)
    assert bad[0] == 2 and one_line(bad[2]).startswith(f"l4jax: error: {folders[1]} does not exist")
    assert good[0] != 0
    assert one_line(good[2]) == f"l4jax: error: process 1 (host {HOST}) stopped with an error; process 0 (host {HOST}) stops"


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

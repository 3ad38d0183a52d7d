"""Several real processes over TCP: one model, and the tokens of one process."""

from __future__ import annotations

import dataclasses
import json
import subprocess

import numpy as np
import pytest

from l4jax import SamplingParams, load
from tests.processes.start import HOST, ends, generate, one_line, start, start_all, together

PROMPTS = [[5, 9, 2, 7, 11, 3, 1, 8, 30, 12, 6, 4, 40, 22, 17, 19, 2, 3], [7], [1, 2, 3]]
# The last has no seed: process 0 draws one for all.
PARAMS = [
    SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=12, seed=3, top_k=20, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=12, ignore_eos=True),
]
GENERATE = """
import numpy as np
from tests.processes.test_answers import PARAMS, PROMPTS
llm = l4jax.load(checkpoint, mesh=mesh)
completions = llm.generate(PROMPTS, PARAMS)
found = {"tokens": [c.token_ids for c in completions], "seed": np.uint64(completions[-1].seed)}
np.savez(results, logprobs=[entry.logprob for entry in completions[1].logprobs], **found)
"""
REFUSE_AND_GENERATE = """
import numpy as np
from tests.processes.test_answers import PARAMS, PROMPTS, refusals
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
def dispatched(step, *rest):
    steps.append([step.number, step.requests, step.burst and step.burst.steps])
    return dispatch(step, *rest)
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


def refusals(llm, checkpoint, mesh, process_id):
    """Ask each process for something else, and return the error messages that it gets; it can continue after each of them."""
    calls = (
        lambda: load([checkpoint, checkpoint + "_other"][process_id], mesh=mesh),
        lambda: load(checkpoint, mesh=[mesh, "data=4"][process_id]),
        lambda: load(checkpoint, mesh=mesh, dtype=[None, "bfloat16"][process_id]),
        lambda: load(checkpoint, mesh="tensor=1"),
        lambda: llm.generate([[1, 2 + process_id]]),
        lambda: llm.generate([[1], [2]], [SamplingParams(), SamplingParams(temperature=[0.5, 0.7][process_id])]),
        lambda: llm.generate([[1]], SamplingParams(logit_bias=dict.fromkeys(range(40), 1.0 + process_id))),
        lambda: llm.score([[1]] * (1 + process_id)),
    )
    messages = []
    for call in calls:
        with pytest.raises(ValueError, match=r"expected|start every process|call every process") as refused:
            call()
        messages.append(str(refused.value))
    return messages


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
    of_prompts = ("prompt 0, counted from 0,", "temperature of prompt 1, counted from 0,", "logit_bias of prompt 0, counted from 0,")
    different = ("the checkpoint's digest", "the mesh", "dtype", *of_prompts, "the number of prompts")
    expected = [f"{name} differs between processes: process 0 (host {HOST}) has " for name in different]
    expected.insert(3, "mesh tensor=1 has 1 device, and 4 cpu devices are present in 2 processes; expected all of them")
    for results in every:
        for i, logits in enumerate(llm.logits(PROMPTS)):
            assert np.abs(results[f"arr_{i}"] - logits).max() < 1e-5 * np.abs(logits).max()
        assert results["tokens"].tolist() == [c.token_ids for c in completions]
        for refused, beginning in zip(results["refused"], expected, strict=True):
            assert refused.startswith(beginning) and "\n" not in refused and len(refused) < 400
        assert "has 0.5, process 1 (host " in results["refused"][5]


@pytest.mark.more_meshes
def test_four_processes_give_the_tokens_of_one(checkpoint, port, tmp_path):
    files = [tmp_path / f"{i}.npz" for i in range(4)]
    for status, _, errors in ends(start_all(GENERATE, 4, checkpoint, "data=2,expert=2", port, files=files), 300):
        assert status == 0, errors
    every = [np.load(file) for file in files]
    _, completions = of_one_process(checkpoint, every)
    for results in every:
        assert results["tokens"].tolist() == [c.token_ids for c in completions]
        np.testing.assert_allclose(results["logprobs"], [entry.logprob for entry in completions[1].logprobs], atol=1e-5)


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
    for (over, error, tokens), ended in zip(first["ended"], ("this stream was closed, ", "this request was cancelled"), strict=True):
        assert over and error.startswith(ended) and len(tokens) < 60


def test_all_read_what_process_0_sends_and_what_was_read_is_deleted(port, tmp_path):
    files = [tmp_path / str(i) for i in range(3)]
    for status, _, errors in ends(start_all(BROADCAST, 3, "", "", port, files=files), 60):
        assert status == 0, errors
    (seconds, kept), *others = (json.loads(file.read_text()) for file in files)
    assert seconds > 1.5 and kept < 3 * 64 + 2 * 3
    for found, _ in others:
        assert found == [str(i) for i in range(300)]


def test_different_checkpoints_end_every_command_in_one_line(checkpoint, port):
    folders = checkpoint, f"{checkpoint}_other"
    for status, out, errors in ends(
        [start(generate(folder, "--mesh", "sequence=2", *together(port, i))) for i, folder in enumerate(folders)], 60
    ):
        assert status == 2 and out == ""
        assert one_line(errors).startswith(f"l4jax: error: the checkpoint's digest differs between processes: process 0 (host {HOST}) has ")

"""The command that measures on an H100, at toy sizes on a CPU; and what it prints and keeps when it cannot continue."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from benchmarks.h100 import __main__ as command
from benchmarks.h100 import generation, launches, ops, source, timing, worker
from benchmarks.h100.bench import Bench, Model, llama_and_head
from benchmarks.h100.errors import DeviceBroken
from benchmarks.h100.generation import BURST, decode_bytes, prefill_flops, round_bytes
from benchmarks.h100.launches import Launches
from benchmarks.h100.ops import CASES, in_turn
from benchmarks.h100.plan import OPS, Item, items, selected
from benchmarks.h100.report import render
from benchmarks.h100.results import Results
from benchmarks.h100.shapes import SHAPES, Attention, Grouped, Linear, Merge
from benchmarks.h100.sizes import REAL, TOY
from l4jax.decoding.plan import Speculation
from l4jax.planning.compile import AbstractModel
from l4jax.planning.target import h100_devices
from sharding.mesh import MeshSpec

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}


def start(out, *options):
    line = [sys.executable, "-m", "benchmarks.h100", "--out", str(out), *options]
    return subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(out, *options):
    process = start(out, *options)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def read(out):
    return json.loads((out / "h100.json").read_text())


def test_a_toy_run_measures_what_is_asked_and_a_second_one_what_is_missing(tmp_path):
    code, stdout, stderr = run(
        tmp_path, "--device", "cpu", "--minutes", "2", "--only", "ceilings", "decode/2", "ops/grouped_matmul", "launches"
    )
    assert (code, stderr) == (0, "")
    first = read(tmp_path)["items"]
    assert {name: item["status"] for name, item in first.items()} == {
        "ceilings": "done",
        "decode/2": "done",
        "ops/grouped_matmul": "done",
        "launches": "skipped",
    }
    assert first["launches"]["why"] == "a CPU has no kernels to launch; expected a GPU"
    contexts = first["decode/2"]["values"]
    assert set(contexts) == {"context 16", "context 160"}
    assert all(0 < values["least_ms"] <= values["ms"] <= values["most_ms"] for values in contexts.values())
    assert first["decode/2"]["compile"]["compile_seconds"] > 0
    assert "| decode/2 | context 160 |" in stdout
    assert "| grouped_matmul | toy experts | XLA: ragged_dot |" in stdout

    code, stdout, stderr = run(tmp_path, "--device", "cpu", "--minutes", "2", "--only", "ceilings", "chain3", "prefill", "--skip", "ops")
    assert (code, stderr) == (0, "")
    second = read(tmp_path)["items"]
    assert second["ceilings"] == first["ceilings"]
    assert 1 <= second["chain3/1"]["values"]["context 16"]["tokens_a_round"] <= 4
    assert set(second["prefill/32"]["values"]) == {"prompt 32", "prompt 64"}
    report = subprocess.run(
        [sys.executable, "-m", "benchmarks.h100.report", tmp_path / "h100.json"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert report.stdout == stdout[stdout.index("**cpu**") :]


def test_a_killed_run_leaves_what_it_measured_and_no_process_behind(tmp_path):
    process = start(tmp_path, "--device", "cpu", "--minutes", "2", "--only", "ceilings", "correctness")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        running = read(tmp_path)["items"].get("correctness/llama", {}).get("status") if (tmp_path / "h100.json").exists() else None
        if running == "running":
            break
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    left = read(tmp_path)["items"]
    assert (left["ceilings"]["status"], left["correctness/llama"]["status"]) == ("done", "running")
    assert len(children) == 1
    while Path(f"/proc/{children[0]}/cmdline").exists() and Path(f"/proc/{children[0]}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.05)
    code, _, stderr = run(tmp_path, "--device", "cpu", "--minutes", "0.0001", "--only", "ceilings", "correctness")
    assert code == 1
    assert stderr.startswith("time is up, and 2 items are left, correctness/llama4 first: call again with --out ")
    assert read(tmp_path)["items"]["correctness/llama"]["status"] == "unfinished"


def test_a_signal_ends_it_in_one_line_with_the_table(tmp_path):
    process = start(tmp_path, "--device", "cpu", "--minutes", "2", "--only", "ceilings", "correctness/llama")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ceilings: done in ")
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Ceilings (measured by the same run)" in stdout
    assert stderr == f"ended by SIGTERM, and 1 items are left, correctness/llama first: call again with --out {tmp_path}\n"


def test_it_ends_in_time(tmp_path):
    started = time.monotonic()
    code, _, stderr = run(tmp_path, "--device", "cpu", "--minutes", "0.1")
    assert time.monotonic() - started < 6.5
    assert code == 1
    assert "time is up, and " in stderr


def test_without_a_gpu_it_says_so_in_one_line_and_writes_no_results(tmp_path):
    code, stdout, stderr = run(tmp_path, "--minutes", "1")
    assert (code, stdout) == (2, "")
    assert stderr.startswith("benchmarks.h100: JAX finds no NVIDIA GPU (")
    assert stderr.endswith("; expected one and jax[cuda13]; --device cpu runs everything at toy sizes\n")
    assert not (tmp_path / "h100.json").exists()


def test_a_closed_standard_output_is_not_taken_for_a_folder_that_cannot_be_written(tmp_path):
    process = start(tmp_path, "--device", "cpu", "--minutes", "0.0001", "--only", "ceilings")
    process.stdout.close()
    process.stdout = None
    _, stderr = process.communicate(timeout=30)
    path = tmp_path / "h100.json"
    assert stderr == f"benchmarks.h100: standard output was closed; for the tables: python -m benchmarks.h100.report {path}\n"
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--minutes", "0"), "'0' is not a number of minutes; expected a number above 0"),
        (("--only", "decode/7"), "'decode/7' is not an item; expected ceilings, chain3, "),
        (("--out", "{file}"), "/file cannot be written (File exists); give a folder that can"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, options, message):
    (tmp_path / "file").write_text("")
    code, stdout, stderr = run(tmp_path / "out", "--device", "cpu", *(option.format(file=tmp_path / "file") for option in options))
    assert (code, stdout) == (2, "")
    assert message in stderr.splitlines()[-1]


HIDING = """
import importlib.abc, importlib.metadata, pkgutil, re, sys

def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()

left, needed = ["jax", "jaxlib", "flax", "numpy", "jaxtyping"], {"l4jax"}
while left:
    name = canonical(left.pop())
    if name in needed:
        continue
    needed.add(name)
    try:
        requires = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        continue
    left += [re.match(r"[\\w.-]+", line)[0] for line in requires if "extra ==" not in line]
owners = importlib.metadata.packages_distributions()
hidden = {module for module, names in owners.items() if not needed & set(map(canonical, names))}
assert {"tokenizers", "tiktoken", "safetensors", "gguf", "jinja2", "pytest"} <= hidden

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in hidden:
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hide())
import benchmarks.h100
for module in pkgutil.iter_modules(benchmarks.h100.__path__):
    __import__(f"benchmarks.h100.{module.name}")
print("imported")
"""


def test_it_needs_jax_flax_numpy_jaxtyping_and_what_those_need():
    done = subprocess.run([sys.executable, "-c", HIDING], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("imported\n", 0), done.stderr


def test_the_supervising_process_does_not_wait_for_jax():
    code = "import sys, benchmarks.h100.__main__; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


CODE = {"code": "c0de"}


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "h100.json")


def started(results, name, source=CODE):
    results.await_items([name])
    results.start(name, source)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (AttributeError("module 'jax' has no attribute 'shard_map'"), "AttributeError: module 'jax' has no attribute 'shard_map'"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating"),
            "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating",
        ),
        (worker.TooLittleMemory("the program needs 51.0 GB"), "the program needs 51.0 GB"),
    ],
)
def test_an_item_that_fails_is_one_line_and_the_next_one_is_measured(monkeypatch, results, capsys, error, why):
    def measure(bench, record):
        record("part", {"ms": 1.0})
        raise error

    modules = {
        "benchmarks.h100.bad": types.SimpleNamespace(measure=measure),
        "benchmarks.h100.good": types.SimpleNamespace(measure=lambda *_: None),
    }
    monkeypatch.setattr(worker.importlib, "import_module", modules.__getitem__)
    results.await_items(["bad", "good"])
    for name in ("bad", "good"):
        worker._measure(Item(name, name), None, results, "c0de")
    kept = Results(results.path).items
    assert (kept["bad"]["status"], kept["bad"]["why"], kept["bad"]["values"]) == ("failed", why, {"part": {"ms": 1.0}})
    assert kept["good"]["status"] == "done"


def test_an_error_of_the_device_ends_the_process_once_it_is_written_down(monkeypatch, results):
    def measure(bench, record):
        raise jax.errors.JaxRuntimeError("INTERNAL: an illegal memory access was encountered")

    monkeypatch.setattr(worker.importlib, "import_module", lambda name: types.SimpleNamespace(measure=measure))
    results.await_items(["bad", "next"])
    with pytest.raises(SystemExit):
        worker._measure(Item("bad", "bad"), None, results, "c0de")
    assert {name: item["status"] for name, item in Results(results.path).items.items()} == {"bad": "failed", "next": "waiting"}


def test_an_item_that_breaks_its_process_down_fails_and_the_others_get_a_new_one(monkeypatch, results, tmp_path):
    plan = selected(items(TOY), ["ceilings", "decode", "prefill"], [])
    calls = []

    def run_worker(path, together, device, deadline, log):
        names = [item.name for item in together]
        calls.append(names)
        now = Results(path)
        now.await_items(names)
        for name in names:
            now.start(name, CODE)
            if name == "decode/1":
                return -signal.SIGSEGV, None
            now.finish(name, "done")
        return 0, None

    monkeypatch.setattr(command, "_run", run_worker)
    with (tmp_path / "log").open("w") as log:
        assert command._measure_missing(results.path, plan, "cpu", time.monotonic() + 60, log) is None
    assert calls == [["ceilings", "decode/1", "decode/2", "prefill/32"], ["decode/2", "prefill/32"]]
    kept = Results(results.path).items
    assert [kept[item.name]["status"] for item in plan] == ["done", "failed", "done", "done"]
    assert kept["decode/1"]["why"].startswith("its process was ended by SIGSEGV")


def test_an_item_that_takes_longer_than_a_call_does_not_keep_others_from_their_turn(monkeypatch, results, tmp_path):
    plan = selected(items(TOY), ["ceilings", "decode", "launches"], [])
    called = []

    def run_worker(path, together, device, deadline, log):
        now = Results(path)
        now.await_items([item.name for item in together])
        for item in together:
            called.append(item.name)
            now.start(item.name, CODE)
            if item.name == "decode/1":
                time.sleep(max(0, deadline - time.monotonic()))
                return -signal.SIGKILL, None
            now.finish(item.name, "done")
        return 0, None

    monkeypatch.setattr(command, "_run", run_worker)
    with (tmp_path / "log").open("w") as log:
        for _ in range(3):
            command._measure_missing(results.path, plan, "cpu", time.monotonic() + 0.1, log)
            command._close_interrupted(results.path, "time is up")
    assert called == ["ceilings", "decode/1", "decode/2", "launches", "decode/1", "decode/1"]
    assert [item.name for item in command._in_turn(plan, Results(results.path))] == ["decode/1"]


def test_a_refusal_after_a_crash_comes_after_the_tables(monkeypatch, results, tmp_path, capsys):
    plan = selected(items(TOY), ["ceilings", "decode/1", "decode/2"], [])
    answers = iter([(-signal.SIGSEGV, None), (1, "JAX finds no NVIDIA GPU")])

    def run_worker(path, together, device, deadline, log):
        now, (code, refused) = Results(path), next(answers)
        if refused is None:
            now.await_items([item.name for item in together])
            now.start("ceilings", CODE)
            now.record("ceilings", "copy", {"bytes_per_second": 3.0e12})
            now.record("ceilings", "matmul", {"flops_per_second": 8.0e14})
            now.finish("ceilings", "done")
            now.start("decode/1", CODE)
        return code, refused

    monkeypatch.setattr(command, "_run", run_worker)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    with (tmp_path / "log").open("w") as log:
        assert command._measure(results.path, plan, "gpu", time.monotonic() + 60, log) == 2
    printed = capsys.readouterr()
    assert "Ceilings (measured by the same run): copy 3000 GB/s" in printed.out
    assert printed.err.startswith("decode/1 failed: its process was ended by SIGSEGV")
    assert printed.err.endswith("benchmarks.h100: JAX finds no NVIDIA GPU\n")


def test_a_worker_that_takes_long_to_end_is_not_waited_for(monkeypatch, results, tmp_path):
    class Worker:
        stdout, killed = (), False

        def wait(self, timeout=1e9):
            if timeout > 10:
                raise AssertionError("it waits for a worker that does not end")
            raise subprocess.TimeoutExpired("worker", timeout)

        def poll(self):
            return None

        def kill(self):
            self.killed = True

    process = Worker()
    monkeypatch.setattr(command.subprocess, "Popen", lambda *_, **__: process)
    with (tmp_path / "log").open("w") as log:
        code, refused = command._run(results.path, items(TOY)[:1], "cpu", time.monotonic(), log)
    assert (code, refused, process.killed) == (-signal.SIGKILL, None, True)
    assert command.ENDING < command.MARGIN


def test_a_process_that_ends_before_its_first_item_is_not_started_for_ever(monkeypatch, results, tmp_path):
    plan = selected(items(TOY), ["decode"], [])

    def run_worker(path, together, device, deadline, log):
        now = Results(path)
        now.await_items([item.name for item in together])
        return 1, None

    monkeypatch.setattr(command, "_run", run_worker)
    with (tmp_path / "log").open("w") as log:
        command._measure_missing(results.path, plan, "cpu", time.monotonic() + 60, log)
    assert {item["status"] for item in Results(results.path).items.values()} == {"failed"}


def test_results_of_another_machine_are_not_mixed(results):
    results.on({"device": "NVIDIA H100 80GB HBM3", "versions": {"jax": "0.12.0"}})
    with pytest.raises(
        ValueError, match=r"holds results of versions \{'jax': '0.12.0'\}, and this is \{'jax': '0.11.2'\}; give another folder"
    ):
        Results(results.path).on({"device": "NVIDIA H100 80GB HBM3", "versions": {"jax": "0.11.2"}})


def test_packages_that_are_only_compared_with_may_come_later(monkeypatch, results):
    installed = {"jax": "0.12.0", "jaxlib": "0.12.0", "flax": "0.12.12"}

    def version(package):
        try:
            return installed[package]
        except KeyError:
            raise source.importlib.metadata.PackageNotFoundError(package) from None

    monkeypatch.setattr(source.importlib.metadata, "version", version)
    results.on(worker._machine("NVIDIA H100 80GB HBM3", "gpu", REAL))
    installed["torch"] = "2.9.0"
    Results(results.path).on(worker._machine("NVIDIA H100 80GB HBM3", "gpu", REAL))
    assert Results(results.path).machine["versions"] == {"jax": "0.12.0", "jaxlib": "0.12.0", "flax": "0.12.12"}

    monkeypatch.setattr(worker.importlib, "import_module", lambda name: types.SimpleNamespace(measure=lambda *_, **__: None))
    item = next(item for item in items(TOY) if item.name == "transformers/decode")
    results.await_items([item.name])
    worker._measure(item, None, results, "c0de")
    assert results.items[item.name]["source"] == {"code": "c0de", "torch": "2.9.0"}


def test_values_of_other_code_or_packages_are_not_mixed_within_an_item(results):
    started(results, "torch/attend", {"code": "c0de", "torch": "2.9.0"})
    results.record("torch/attend", "part", {"ms": 1.0})
    results.record("torch/attend", "compile", {"compile_seconds": 2.0})
    results.await_items(["torch/attend"])
    results.start("torch/attend", {"code": "c0de", "torch": "2.9.0"})
    assert results.items["torch/attend"]["values"] == {"part": {"ms": 1.0}}
    results.await_items(["torch/attend"])
    assert results.items["torch/attend"]["values"] == {"part": {"ms": 1.0}}
    results.start("torch/attend", {"code": "c0de", "torch": "2.10.0"})
    assert (results.items["torch/attend"]["values"], results.items["torch/attend"]["compile"]) == ({}, {})


def test_the_report_says_what_was_measured_with_which_code(results):
    for name, other in (("decode/1", "aaaa"), ("decode/8", "aaaa"), ("torch/attend", "bbbb")):
        started(results, name, {"code": other} | ({"torch": "2.9.0"} if "torch" in name else {}))
        results.record(name, "8B | context 1024", {"ms": 1.0, "least_ms": 1.0, "most_ms": 1.0, "bytes": 1, "flops": 1})
    lines = render([results]).splitlines()
    assert "**Not everything was measured with the same code.**" in lines
    assert {"- code aaaa: decode/1, decode/8", "- code bbbb: torch/attend", "- torch 2.9.0: torch/attend"} <= set(lines)


def test_the_digest_changes_with_what_is_measured_only(tmp_path):
    (tmp_path / "l4jax" / "__pycache__").mkdir(parents=True)
    (tmp_path / "l4jax" / "a.py").write_text("a = 1")
    first = source.digest(tmp_path)
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "l4jax" / "__pycache__" / "a.pyc").write_text("b")
    assert source.digest(tmp_path) == first
    (tmp_path / "l4jax" / "a.py").write_text("a = 2")
    assert len({first, source.digest(tmp_path), source.digest()}) == 3


@pytest.mark.parametrize("item", ["torch", "launches"])
def test_a_folder_of_another_machine_is_refused_whatever_is_measured(results, item):
    results.on({"sizes": "real", "device": "NVIDIA H100 80GB HBM3"})
    code, stdout, stderr = run(results.path.parent, "--device", "cpu", "--minutes", "1", "--only", item)
    assert (code, stdout) == (2, "")
    assert stderr.endswith("h100.json holds results of sizes 'real', and this is 'toy'; give another folder for these\n")
    assert Results(results.path).items == {}


def test_pytorch_names_the_machine_too(monkeypatch, tmp_path):
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "NVIDIA H100 80GB HBM3"))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert worker._torch_bench(REAL, "gpu", tmp_path)[1] == "NVIDIA H100 80GB HBM3"
    assert worker._torch_bench(TOY, "cpu", tmp_path)[1] == "cpu"
    monkeypatch.setitem(sys.modules, "torch", None)
    assert worker._torch_bench(REAL, "gpu", tmp_path)[1] is None


@pytest.mark.parametrize("text", ["", "[]", '{"format": 0}', '{"format": 1, "machine": {}}'])
def test_a_file_that_is_not_ours_is_refused_and_kept(tmp_path, text):
    (tmp_path / "h100.json").write_text(text)
    code, _, stderr = run(tmp_path, "--device", "cpu", "--minutes", "1")
    assert code == 2
    assert "h100.json does not hold results of this benchmark" in stderr
    assert (tmp_path / "h100.json").read_text() == text


def test_the_first_compilation_is_the_one_whose_seconds_are_kept(results):
    for seconds in (12.0, 0.4):
        started(results, "decode/1")
        results.record("decode/1", "compile", {"compile_seconds": seconds})
    assert Results(results.path).items["decode/1"]["compile"] == {"compile_seconds": 12.0}


def test_floors_are_the_same_runs_ceilings_and_say_so(results):
    started(results, "decode/1")
    results.record("decode/1", "context 1024", {"ms": 10.0, "least_ms": 9.0, "most_ms": 11.0, "bytes": 15_000_000_000})
    assert "Ceilings (an H100's data sheet): copy 3350 GB/s" in render([results])
    assert "| 10 | 9 to 11 | 4.48 | 45% |" in render([results])
    started(results, "ceilings")
    results.record("ceilings", "copy", {"bytes_per_second": 3.0e12})
    results.record("ceilings", "matmul", {"flops_per_second": 8.0e14})
    assert "Ceilings (measured by the same run): copy 3000 GB/s, bfloat16 matrix product 800 TFLOP/s" in render([results])
    results.record("ceilings", "read", {"bytes_per_second": 3.1e12})
    assert "copy 3000 GB/s, reading 3100 GB/s, bfloat16" in render([results])
    assert "| 10 | 9 to 11 | 5 | 50% |" in render([results])


def test_a_step_of_the_8b_model_reads_its_published_parameters_and_its_cache():
    config, drafter = llama_and_head(REAL)
    abstract = AbstractModel(config, MeshSpec(), jax.devices()[:1], jnp.dtype(jnp.bfloat16), drafter)
    model = Model(abstract, abstract.decode_call(1, 128, command_params()).arguments[0], ())
    embedding, parameters = 128256 * 4096, 8_030_261_248
    a_token = 32 * 2 * 8 * 128 * 2
    assert decode_bytes(model, 8, 1024) == 2 * (parameters - embedding) + 8 * (1024 + 16) * a_token
    chain = Speculation.parse("chain:3")
    drafting = dataclasses.replace(model, draft_leaves=(jax.ShapeDtypeStruct((100, 7), jnp.bfloat16),))
    assert round_bytes(drafting, 8, 1024, chain) == decode_bytes(model, 8, 1024) + 3 * 1400
    # Two a parameter and token, the head once, and scores of the pairs that causal attention leaves.
    norms = 65 * 4096
    matrices = parameters - 2 * embedding - norms
    assert prefill_flops(config, 2048, 1) == 2 * matrices * 2048 + 2 * embedding + 32 * 4 * 4096 * 2048 * 2049 // 2


def command_params():
    from l4jax import SamplingParams

    return SamplingParams(temperature=0.0)


@pytest.mark.parametrize("op", ["attend_pages", "attend", "matmul", "grouped_matmul"])
def test_rivals_in_jax_compute_what_our_op_does(op):
    arrays, implementations, _ = CASES[op](SHAPES["toy"][op][0])
    given = arrays(jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention needs it
        own, other = (
            jnp.asarray(function(*given), jnp.float32) for name, function in implementations.items() if not name.startswith("cuDNN")
        )
    assert jnp.abs(own.reshape(other.shape) - other).max() <= 0.02 * jnp.abs(own).max()


def test_every_op_is_timed():
    rooms = [importlib.import_module(f"pallas_kernels.{room.name}") for room in pkgutil.iter_modules(pallas_kernels.__path__) if room.ispkg]
    public = {name for room in rooms for name in room.__all__ if name != "Partial"}
    # attend_masked is a part of tree_attention, and timed within it.
    timed = {name.replace("merge_attention", "merge") for name in public - {"attend_masked"}}
    assert timed == set(OPS) == set(CASES) == set(SHAPES["real"])


def test_the_arrays_of_every_shape_exceed_the_l2_cache():
    for op, case in CASES.items():
        for shape in SHAPES["real"][op]:
            given = jax.eval_shape(case(shape)[0], jax.random.key(0))
            nbytes = sum(array.size * array.dtype.itemsize for array in given)
            copies = REAL.copies(shape.nbytes)
            assert REAL.rotated_bytes <= copies * shape.nbytes < 2e9, shape
            assert copies * nbytes > 1.4 * 50 * 2**20, shape  # without the results


@pytest.mark.optimized
def test_every_call_is_made_in_every_turn_with_all_that_it_computes():
    """XLA removes calls whose results nothing needs, and moves out of the loop what does not wait for the turn."""

    def op(x_MD, w_DD):
        return x_MD + jnp.sort(w_DD, axis=0)

    sets = [(jnp.full((4, 4), float(i)), jnp.arange(16.0).reshape(4, 4)[::-1] + i) for i in range(3)]
    compiled = jax.jit(in_turn(op, loops=5)).lower(sets).compile()
    loops = re.findall(r"\n%?(\S*body\S*|\S*region\S*|ENTRY \S+) .*\{\n((?:  .*\n)*)", compiled.as_text())
    assert sorted((text.count(" sort("), name.startswith("ENTRY")) for name, text in loops if " sort(" in text) == [(3, False)]
    turn, results = compiled(sets)
    assert turn == 4
    for result, given in zip(results, sets, strict=True):
        assert (result == op(*given)).all()


@pytest.mark.h100
@pytest.mark.parametrize("name", ["own", "XLA: pages gathered, then dot_product_attention"])
def test_every_call_is_made_in_every_turn_on_an_h100(name):
    sharding = jax.sharding.SingleDeviceSharding(h100_devices(1)[0])
    shape = Attention("8B decode, 1 row, 8K", 1, 1, 8192)
    arrays, implementations, _ = CASES["attend_pages"](shape)
    given = jax.eval_shape(arrays, jax.random.key(0))
    given = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding) for array in given)
    copies = REAL.copies(shape.nbytes)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention needs it
        text = jax.jit(in_turn(implementations[name], loops=4)).lower([given] * copies).compile().as_text()
    before, entry = text[: text.index("\nENTRY")], text[text.index("\nENTRY") :]
    assert copies == 4
    assert "gather(" not in entry
    if name == "own":
        assert before.count(" while(") == copies
    else:
        assert before.count(" gather(") == 2 * copies  # keys and values


class Clock:
    """Time that passes only while a result is waited for; ``seconds``: for each dispatch, in turn."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.dispatched, self.waited, self._seconds = 0.0, 0, 0, iter(seconds)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing.jax, "block_until_ready", self._wait)

    def dispatch(self):
        self.dispatched += 1
        return next(self._seconds)

    def _wait(self, seconds):
        self.waited += 1
        self.now += seconds


def test_dispatches_are_waited_for_and_the_first_does_not_count(monkeypatch):
    clock = Clock(monkeypatch, [9.0, 1.0, 2.0, 3.0])
    assert timing.repeated(clock.dispatch, budget=0.0) == [1.0, 2.0, 3.0]
    assert (clock.dispatched, clock.waited) == (4, 4)


@pytest.mark.parametrize(("budget", "count"), [(0.0, 3), (3.5, 4), (100.0, 20)])
def test_dispatches_repeat_until_the_budget_is_spent(monkeypatch, budget, count):
    clock = Clock(monkeypatch, [1.0] * 30)
    assert timing.repeated(clock.dispatch, budget=budget) == [1.0] * count


def test_queued_dispatches_are_waited_for_once_and_share_the_time(monkeypatch):
    clock = Clock(monkeypatch, [float(i) for i in range(16)])
    assert timing.queued(clock.dispatch, 4, budget=0.0) == [7 / 4, 11 / 4, 15 / 4]
    assert (clock.dispatched, clock.waited) == (16, 4)


def test_times_are_of_one_call():
    assert timing.summary([0.3, 0.1, 0.8], per=10) == {"ms": 30.0, "least_ms": 10.0, "most_ms": 80.0, "repetitions": 3}


def test_a_call_of_an_op_is_timed_over_all_copies_and_turns(monkeypatch):
    sizes = dataclasses.replace(TOY, rotated_bytes=3 * 128, most_loops=7)
    monkeypatch.setattr(timing, "repeated", lambda dispatch, budget: [len(dispatch()[1]) * 7 * 1e-3] * 3)
    times, _ = ops.timed(Bench(sizes, jax.devices()[0], Path()), jnp.negative, lambda key: (jnp.zeros(16),), 128, 0)
    assert times["ms"] == pytest.approx(1.0)


def bench_of_cpu(tmp_path=Path(), sizes=TOY):
    return Bench(sizes, jax.devices()[0], tmp_path)


def recorder(results, name):
    started(results, name)
    return lambda key, values: results.record(name, key, values)


def test_an_implementation_that_fails_does_not_stop_the_others(results):
    def missing(x):
        raise ImportError("no cuDNN here")

    def fails(x):
        return jax.pure_callback(lambda x: 1 / 0, x, x)

    shape = Linear("toy", 2, 4, 4)
    implementations = {"missing": missing, "fails when it runs": fails, "good": jnp.negative}
    ops.compare(bench_of_cpu(), recorder(results, "ops/matmul"), shape, lambda key: (jnp.zeros(4),), implementations, 8)
    item = results.items["ops/matmul"]
    values = item["values"]
    assert values["toy | missing"]["why"] == "ImportError: no cuDNN here"
    assert "CpuCallback error" in values["toy | fails when it runs"]["why"]
    assert values["toy | good"]["ms"] > 0
    assert set(item["compile"]) == {"toy | good"}


def test_a_device_that_does_not_respond_ends_the_item(monkeypatch, results):
    def fails(x):
        monkeypatch.setattr(jax, "block_until_ready", fails)
        raise jax.errors.JaxRuntimeError("INTERNAL: an illegal memory access was encountered")

    with pytest.raises(DeviceBroken, match=r"the device does not respond after that .*illegal memory access"):
        ops.compare(bench_of_cpu(), recorder(results, "ops/matmul"), Linear("toy", 2, 4, 4), lambda key: (jnp.zeros(4),), {"own": fails}, 8)
    assert results.items["ops/matmul"]["values"]["toy | own"]["why"].startswith("JaxRuntimeError: INTERNAL")


def test_each_dispatch_is_divided_by_its_own_rounds(monkeypatch):
    turns = iter([np.array([30, 32]), np.array([8, 10]), np.array([20, 16]), np.array([32, 32])])

    def burst(state, context):
        return state + 1, next(turns), np.zeros((BURST, 2), np.int32)

    monkeypatch.setattr(timing, "repeated", lambda dispatch, budget: [dispatch() and seconds for seconds in (9.0, 1.0, 2.0, 3.2)][1:])
    state, times, tokens_a_round = generation._timed_bursts(bench_of_cpu(), burst, 0, 16)
    assert state == 4
    assert (times["least_ms"], times["ms"], times["most_ms"]) == pytest.approx((100, 100, 100))
    assert tokens_a_round == pytest.approx(3 * BURST / (10 + 20 + 32))


def test_a_burst_that_ends_early_is_not_a_measurement():
    tokens_sB = np.full((BURST, 2), -1, np.int32)
    tokens_sB[0] = 5
    with pytest.raises(RuntimeError, match=f"a dispatch produced 1 tokens a row instead of {BURST}: the logits were not finite"):
        generation._timed_bursts(bench_of_cpu(), lambda state, context: (state, np.int32(1), tokens_sB), 0, 16)


@pytest.mark.parametrize(("peaks", "kept"), [((5, 9), {"memory": {"peak_bytes": 9}}), ((9, 9), {}), ((None, None), {})])
def test_the_peak_is_the_items_own_or_none(monkeypatch, results, peaks, kept):
    bench = types.SimpleNamespace(peak_bytes=peaks[0])
    monkeypatch.setattr(generation, "decode", lambda bench, record: setattr(bench, "peak_bytes", peaks[1]))
    generation.measure(bench, recorder(results, "decode/1"), part="decode")
    assert results.items["decode/1"]["values"] == kept


def test_fewer_rows_than_groups_read_a_matrix_a_row():
    few, many = Grouped("few", 3, 16, 8, 4), Grouped("many", 40, 16, 8, 4)
    assert (few.nbytes, sum(few.sizes)) == (2 * (3 * 32 + 3 * 12), 3)
    assert (many.nbytes, sum(many.sizes)) == (2 * (16 * 32 + 40 * 12), 40)


def test_a_product_and_a_merge_move_their_arrays_once():
    linear, merge = Linear("product", 3, 8, 4), Merge("merge", 2, 1, 4, 3, h=16)
    assert (linear.nbytes, linear.flops) == (2 * (32 + 24 + 12), 2 * 3 * 32)
    assert (merge.nbytes, merge.flops) == (4 * (3 + 1) * 2 * 4 * 17, 3 * 2 * 2 * 4 * 16)


THUNKS = """\
001: kCopy         [source       | next=004 (3)] kCopy
004: kWhile        [prev=003 (1) | sink        ]
condition:
    005: kCustomKernel [source | sink] loop_and_fusion grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source       | next=025 (1)]
        006: kCopy         [source       | next=007 (1)] kCopy
        008: kCustomKernel [source       | next=017 (9)] gemm grid: [1, 1, 1]
    025: kWhile         [prev=000 (1) | next=000 (1)]
condition:
        026: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1]
      body:
        000: kCommandBuffer [source | sink]
            027: kCopy         [source       | next=029 (2)] kCopy
            028: kCustomKernel [source       | next=029 (1)] slice grid: [1024, 1, 1]
    030: kCustomKernel [source | sink] alone grid: [1, 1, 1]
    000: kCommandBuffer [prev=025 (1) | next=053 (1)]
        036: kCustomKernel [source       | next=037 (1)] divide grid: [32, 1, 1]
"""


class Dumping:
    """A call whose compilation dumps these files."""

    def __init__(self, files):
        self._files = files

    def lower(self):
        return self

    def compile(self, compiler_options):
        folder = Path(compiler_options["xla_dump_to"])
        assert compiler_options["xla_dump_hlo_as_text"] is True
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self._files.items():
            (folder / name).write_text(text)


ONE_KERNEL = "000: kWhile [source | sink]\n  body:\n    001: kCopy [source | sink]\n"


def test_launches_are_read_anew_whatever_an_earlier_process_left(tmp_path):
    folder = tmp_path / "a b" / "decode-2"
    changed = {"module_0001.jit_f.thunk_sequence.txt": ONE_KERNEL * 9, "module_0001.jit_f.thunk_sequence_after_thunk_passes.txt": THUNKS}
    for _ in range(2):
        assert launches.compiled(Dumping(changed), folder) == Launches.of(THUNKS)
    # Thunks of which no graph was made are dumped once; those of small programs are dumped beside them.
    unchanged = {"module_0001.jit_f.thunk_sequence.txt": ONE_KERNEL, "module_0002.jit_g.thunk_sequence.txt": ""}
    assert launches.compiled(Dumping(unchanged), folder) == Launches(1, 0, 1, 0, 0, 0)
    with pytest.raises(NotImplementedError, match=r"this version of JAX does not dump \*thunk_sequence.txt; expected 0.11.2 or 0.12"):
        launches.compiled(Dumping({}), folder)


@pytest.mark.h100
def test_a_program_for_an_h100_is_dumped_and_counted(tmp_path):
    sharding = jax.sharding.SingleDeviceSharding(h100_devices(1)[0])
    x_DD = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)
    program = jax.jit(lambda x_DD: jax.lax.while_loop(lambda x_DD: x_DD[0, 0] < 1, lambda x_DD: jnp.sin(x_DD @ x_DD), x_DD))
    counted = launches.compiled(types.SimpleNamespace(lower=lambda: program.lower(x_DD)), tmp_path / "a b")
    assert counted.kernels >= 2


def test_launches_are_counted_by_the_loop_that_they_are_in():
    counted = Launches.of(THUNKS)
    assert counted == Launches(kernels=5, graphs=2, single=2, loops=1, kernels_a_turn=3, graphs_a_turn=1)
    assert dataclasses.astuple(counted - counted) == (0,) * 6


def test_items_come_in_order_of_worth_and_groups_can_be_named():
    names = [item.name for item in items(REAL)]
    first = ["ceilings", "correctness/llama", "decode/1", "decode/8", "decode/32", "chain3/1", "eagle26/1", "prefill/2048"]
    assert names[: len(first)] == first
    assert [item.name for item in selected(items(REAL), ["decode"], ["decode/8"])] == ["decode/1", "decode/32"]

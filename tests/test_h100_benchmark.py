"""The command that measures on an H100, at toy sizes on a CPU; and what it prints and keeps when it cannot continue."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.h100 import __main__ as command
from benchmarks.h100 import worker
from benchmarks.h100.bench import Model, llama_and_head
from benchmarks.h100.generation import decode_bytes, prefill_flops
from benchmarks.h100.launches import Launches
from benchmarks.h100.ops import CASES
from benchmarks.h100.plan import Item, items, selected
from benchmarks.h100.report import render
from benchmarks.h100.results import Results
from benchmarks.h100.shapes import SHAPES, Grouped
from benchmarks.h100.sizes import REAL, TOY
from l4jax.planning.compile import AbstractModel
from sharding.mesh import MeshSpec

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


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
    assert "| 10 | 9 to 11 | 5 | 50% |" in render([results])


def test_a_step_of_the_8b_model_reads_its_published_parameters_and_its_cache():
    config, drafter = llama_and_head(REAL)
    abstract = AbstractModel(config, MeshSpec(), jax.devices()[:1], jnp.dtype(jnp.bfloat16), drafter)
    model = Model(abstract, abstract.decode_call(1, 128, command_params()).arguments[0], ())
    embedding, parameters = 128256 * 4096, 8_030_261_248
    a_token = 32 * 2 * 8 * 128 * 2
    assert decode_bytes(model, 8, 1024) == 2 * (parameters - embedding) + 8 * (1024 + 16) * a_token
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


def test_fewer_rows_than_groups_read_a_matrix_a_row():
    few, many = Grouped("few", 3, 16, 8, 4), Grouped("many", 40, 16, 8, 4)
    assert (few.nbytes, sum(few.sizes)) == (2 * (3 * 32 + 3 * 12), 3)
    assert (many.nbytes, sum(many.sizes)) == (2 * (16 * 32 + 40 * 12), 40)


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


def test_launches_are_counted_by_the_loop_that_they_are_in():
    counted = Launches.of(THUNKS)
    assert counted == Launches(kernels=5, graphs=2, single=2, loops=1, kernels_a_turn=3, graphs_a_turn=1)
    assert dataclasses.astuple(counted - counted) == (0,) * 6


def test_items_come_in_order_of_worth_and_groups_can_be_named():
    names = [item.name for item in items(REAL)]
    first = ["ceilings", "correctness/llama", "decode/1", "decode/8", "decode/32", "chain3/1", "eagle26/1", "prefill/2048"]
    assert names[: len(first)] == first
    assert [item.name for item in selected(items(REAL), ["decode"], ["decode/8"])] == ["decode/1", "decode/32"]

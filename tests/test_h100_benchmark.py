"""The command that measures on an H100, at toy sizes on a CPU; and what it prints and keeps when it cannot continue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import pytest
from jax._src.compilation_cache import compress_executable

from benchmarks.h100 import __main__ as command
from benchmarks.h100 import source, worker
from benchmarks.h100.plan import Item, items, selected
from benchmarks.h100.report import render
from benchmarks.h100.results import Results
from benchmarks.h100.sizes import REAL, TOY

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
    code, stdout, stderr = run(tmp_path, "--device", "cpu", "--minutes", "2", "--only", "ceilings", "decode/2", "ops/experts", "launches")
    assert (code, stderr) == (0, "")
    first = read(tmp_path)["items"]
    assert {name: item["status"] for name, item in first.items()} == {
        "ceilings": "done",
        "decode/2": "done",
        "ops/experts": "done",
        "launches": "skipped",
    }
    assert first["launches"]["why"] == "a CPU has no kernels to launch; expected a GPU"
    contexts = first["decode/2"]["values"]
    assert set(contexts) == {"context 16", "context 160"}
    assert all(0 < values["least_ms"] <= values["ms"] <= values["most_ms"] for values in contexts.values())
    assert first["decode/2"]["compile"]["compile_seconds"] > 0
    assert "| decode/2 | context 160 |" in stdout
    assert "| experts | toy experts | XLA: ragged_dot, twice |" in stdout

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


def test_items_come_in_order_of_worth_and_groups_can_be_named():
    names = [item.name for item in items(REAL)]
    first = [
        "ceilings",
        "correctness/llama",
        "kernels/tree_attention",
        "kernels/merge_splits",
        "kernels/flash_attention",
        "kernels/experts",
        "kernels/write_heads",
        "kernels/add_norm",
        "decode/1",
        "decode/8",
        "decode/32",
        "chain3/1",
        "eagle26/1",
        "prefill/8192",
    ]
    assert names[: len(first)] == first
    assert [item.name for item in selected(items(REAL), ["decode"], ["decode/8"])] == ["decode/1", "decode/32"]


def test_what_a_killed_process_left_half_written_is_compiled_again(tmp_path):
    for name, content in (("whole-cache", compress_executable(b"a program")), ("half-cache", compress_executable(b"a program")[:-3])):
        (tmp_path / name).write_bytes(content)
    worker.remove_damaged(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["whole-cache"]

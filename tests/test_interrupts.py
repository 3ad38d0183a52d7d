"""Ctrl-C ends long work wherever it falls; a conversion or training continues with the next run."""

from __future__ import annotations

import gc
import json
import signal
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest

from l4jax import LLM, SamplingParams
from l4jax.checkpoints import convert as convert_module
from l4jax.checkpoints import store
from l4jax.checkpoints.convert import convert
from l4jax.checkpoints.store import open_checkpoint
from l4jax.cli import main
from l4jax.engine.runner import Runner
from l4jax.interrupts import kept_interrupts
from l4jax.training.trainer import Trainer
from tests import tiny
from tests.checkpoints.folders import golden
from tests.test_llm import TOKENIZER
from tests.training import small
from tests.training.test_run import train


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Python's own handler of Ctrl-C: a shell starts commands in the background with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def in_the_garbage_collector() -> None:
    """Raise the signal in a callback of the garbage collector: JAX has one, and it may run at any time."""

    def callback(phase: str, info: object) -> None:
        gc.callbacks.remove(callback)
        signal.raise_signal(signal.SIGINT)

    gc.callbacks.append(callback)
    gc.collect()


class Finalised:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def in_a_finaliser() -> None:
    Finalised()


def in_a_weak_reference() -> None:
    thing = threading.local()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    assert reference() is None


def in_the_open() -> None:
    signal.raise_signal(signal.SIGINT)


PLACES = [in_the_garbage_collector, in_a_finaliser, in_a_weak_reference, in_the_open]


@pytest.mark.parametrize("place", PLACES)
def test_ctrl_c_ends_a_conversion_that_the_next_one_continues(place, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(store, "GROUP_BYTES", 1 << 14)
    source = golden("llama3_tied", tmp_path / "source")
    before, written = (signal.getsignal(signal.SIGINT), sys.unraisablehook), []
    save_group = convert_module.save_group

    def saved(directory, arrays):
        save_group(directory, arrays)
        written.append(directory.name)
        if len(written) == 3:
            place()

    monkeypatch.setattr(convert_module, "save_group", saved)
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 130
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before
    assert [line for line in capfd.readouterr().err.splitlines() if line.strip() and "converting" not in line] == ["l4jax: interrupted"]
    assert not (tmp_path / "ours").exists()
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    checkpoint = open_checkpoint(tmp_path / "ours")
    groups = sorted(checkpoint.groups(checkpoint.weights))
    # The third group is written again if the interruption came before the progress file named it.
    assert written[:3] == groups[:3] and sorted(set(written)) == groups and len(groups) > 4
    assert len(written) <= len(groups) + 1
    checkpoint.verify()


@pytest.mark.parametrize("place", PLACES)
def test_ctrl_c_ends_an_export(place, tmp_path, monkeypatch):
    convert(golden("llama3_tied", tmp_path / "source"), tmp_path / "ours")
    read_group = store.Stored.read_group

    def read(self, group):
        place()
        return read_group(self, group)

    monkeypatch.setattr(store.Stored, "read_group", read)
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "hf"]) == 130
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("work", [["show", "--verify"], ["generate", "-p", "x"]], ids=["show", "load"])
def test_ctrl_c_ends_reading(place, work, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(store, "GROUP_BYTES", 1 << 14)
    convert(golden("llama3_tied", tmp_path / "source"), tmp_path / "ours")
    load_group, read = store.load_group, []

    def loaded(directory, *arguments):
        read.append(directory)
        place()
        return load_group(directory, *arguments)

    monkeypatch.setattr(store, "load_group", loaded)
    assert main([*work, str(tmp_path / "ours")]) == 130
    assert len(read) == 1
    assert capfd.readouterr().err == "l4jax: interrupted\n"


CALLS = {
    "dispatch": lambda llm: llm.logits([[1], [2], [3]]),
    "prefill_call": lambda llm: llm.generate([[1], [2], [3]], SamplingParams(max_tokens=2)),
    "burst_call": lambda llm: list(llm.stream([1], SamplingParams(max_tokens=100, ignore_eos=True))),
    "small_calls": lambda llm: llm.warmup(max_length=100),
}
"""Calls, by what the runner does in them first of all, or more than once."""


@pytest.fixture(scope="module")
def llm():
    config = tiny.shallow(tiny.llama3_like())
    made = LLM(config, tiny.weights(config), max_batch=2, tokenizer=TOKENIZER)
    made.generate([[1]], SamplingParams(max_tokens=4))  # a step waits for those in flight if its programs may have to be compiled
    return made


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("step", CALLS)
def test_ctrl_c_ends_a_call(step, place, llm, monkeypatch):
    original, taken = getattr(Runner, step), []

    def take(self, *arguments, **options):
        taken.append(step)
        place()
        return original(self, *arguments, **options)

    monkeypatch.setattr(Runner, step, take)
    with pytest.raises(KeyboardInterrupt):
        CALLS[step](llm)
    assert taken == [step]


def test_ctrl_c_ends_a_training(tmp_path, monkeypatch):
    config, step, taken = small.config(), Trainer.step, []
    (tmp_path / "data").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in tiny.prompts(config, tuple(range(2, 14)))))

    def take(*arguments):
        taken.append(1)
        in_the_garbage_collector()
        return step(*arguments)

    monkeypatch.setattr(Trainer, "step", take)
    with pytest.raises(KeyboardInterrupt):
        train(LLM(config, tiny.weights(config), max_batch=4), tmp_path / "data", tmp_path / "out")
    assert taken == [1]


def test_what_is_not_an_interruption_is_still_reported(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_type))

    class Failing:
        def __del__(self) -> None:
            raise LookupError

    with kept_interrupts() as check:
        Failing()
        check()
    assert reported == [LookupError]


def test_a_handler_that_goes_on_decides(monkeypatch):
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:
        with kept_interrupts() as check:
            signal.raise_signal(signal.SIGINT)
            check()
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == [1]


def test_another_thread_is_left_alone():
    seen = []

    def run() -> None:
        with kept_interrupts() as check:
            check()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]

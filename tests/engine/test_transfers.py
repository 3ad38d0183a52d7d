"""What a step costs the host beside the devices' work: calls of programs, and arrays sent to the devices and read from them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from l4jax import LLM, SamplingParams
from l4jax.compiled import Program
from l4jax.decoding.generate import BURST
from l4jax.engine.step import Step
from tests.engine.families import FAMILIES, SLOTS, watched
from tests.test_programs import count_compilations
from tests.tiny import prompts

DRAFTED = "llama4 in chunks of 256, with a drafter"
FULL, LOCAL = 4, {"llama3": 1, DRAFTED: 2}
"""Pages in a row's tables: those of the context of 512, and those of a chunk; without chunks that table has one entry."""
UPDATE = (4, 1, 1, 4, 4, 4, 4, 4, 4, 4, 8, 4 * 1024, 4 * 1024, 4 * 64, 4, 4)
"""Bytes that an update sends for each slot: two flags, a seed, lists of biases and of stop tokens, and numbers."""


@dataclasses.dataclass
class Counts:
    """What one step cost: the programs that were called, and the bytes of each array that was sent or read."""

    step: Step
    calls: list[str] = dataclasses.field(default_factory=list)
    sent: list[int] = dataclasses.field(default_factory=list)
    read: list[int] = dataclasses.field(default_factory=list)


class Watch:
    """An LLM whose transfers are counted."""

    def __init__(self, llm: LLM, **options: Any) -> None:
        self.steps: list[Counts] = []
        self.llm = watched(llm, lambda step: self.steps.append(Counts(step)), **options)
        programs = self.llm.engine.runner.programs = copy.copy(llm.engine.runner.programs)
        for name, program in vars(programs).items():
            if isinstance(program, Program):
                setattr(programs, name, self.counted(name, program))

    def counted(self, name: str, program: Program) -> Callable[..., Any]:
        def call(*arguments: Any, **static: Any) -> Any:
            self.steps[-1].calls.append(name)
            self.steps[-1].sent += [leaf.nbytes for leaf in jax.tree.leaves(arguments) if isinstance(leaf, np.ndarray)]
            with jax.transfer_guard_host_to_device("allow"):
                return program(*arguments, **static)

        return call

    def run(self) -> list[Counts]:
        """One step of the engine after another, to the end, and what each dispatched step cost."""
        del self.steps[:]
        reading = 0

        def read(nbytes: int) -> None:
            self.steps[reading].read.append(nbytes)

        with reads_counted(read), no_other_work():
            while self.llm.step():
                reading += 1
        return self.steps


@contextlib.contextmanager
def no_other_work() -> Iterator[None]:
    """Nothing is sent to the devices but by calls of programs, and no other JAX operation runs: it would be compiled anew."""
    with (
        jax.transfer_guard_host_to_device("disallow_explicit"),
        jax.default_matmul_precision("tensorfloat32"),  # no other test has it, so no operation is compiled for it
        count_compilations() as compiled,
    ):
        yield
    assert not compiled, "a JAX operation ran outside the programs"


@contextlib.contextmanager
def reads_counted(read: Callable[[int], None]) -> Iterator[None]:
    """Call ``read`` with the bytes of each device array that the host reads. JAX's own guard lets a CPU's arrays be read."""
    kind = type(jax.device_put(np.zeros(1)))
    value, depth = vars(kind)["_value"], 0

    def counting(convert: Callable[..., Any]) -> Callable[..., Any]:
        def counted(array: Any, *arguments: Any, **named: Any) -> Any:
            nonlocal depth
            if not depth and isinstance(array, jax.Array):
                read(array.nbytes)
            depth += 1
            try:
                return convert(array, *arguments, **named)
            finally:
                depth -= 1

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_value", property(counting(value.fget)))
        patch.setattr(np, "asarray", counting(np.asarray))
        patch.setattr(np, "array", counting(np.array))
        yield


def sent_by(step: Step, name: str) -> list[int]:
    """Bytes of the arrays that a step needs; a drafter's page tables are sent once more."""

    def tables(rows: int) -> list[int]:
        return [4 * FULL * rows, 4 * LOCAL[name] * rows] * (2 if FAMILIES[name].drafts else 1)

    sent: list[int] = []
    if any(row is not None and row.first for row in step.pieces):
        sent += [nbytes * SLOTS for nbytes in UPDATE]
    if step.prefill:
        rows = len(step.pieces)
        sent += [4 * step.prefill.length * rows, 4 * rows, 4 * rows, 4 * rows, rows, 4 * rows, 4 * rows, *tables(rows)]
    if step.burst:
        rows = len(step.rows)
        sent += [4 * rows, 4 * rows, *tables(rows), 4]
    return sent


def read_from(step: Step) -> list[int]:
    """Bytes of the tokens and flags of a step's rows; and of its rounds, tokens drafted and accepted at each level, if it speculates."""
    read = [4 * len(step.pieces), len(step.pieces)] if step.prefill else []
    if step.burst:
        rows, plan = len(step.rows), step.burst.plan
        depth = plan.depth if plan else 0
        read += [4 * BURST * (1 + depth) * rows, rows]
        read += [4 * rows, 4 * rows, 4 * depth * rows] if plan else []
    return read


@pytest.mark.parametrize(("name", "speculates"), [("llama3", False), (DRAFTED, False), (DRAFTED, True)])
def test_what_a_step_sends_and_reads(name: str, speculates: bool) -> None:
    """Numbers of each row and its page tables go to the devices, and tokens come back: nothing as large as vocabulary or cache."""
    family = FAMILIES[name]
    watch = Watch(family.llm, plans=((1, family.llm.engine.options.plans[0][1] if speculates else None),), long_steps=8, short_steps=8)
    params = SamplingParams(max_tokens=100, temperature=0.7, seed=1, ignore_eos=True)
    asked = prompts(family.config, (300, 5))
    watch.llm.generate(asked, params)  # compiles, and allocates the cache
    for prompt in prompts(family.config, (300, 5), seed=1):
        watch.llm.add(prompt, params)
    steps = watch.run()
    assert sum(counts.step.prefill is not None for counts in steps) >= 3 and sum(counts.step.burst is not None for counts in steps) >= 8
    for counts in steps:
        step = counts.step
        calls = ["update_slots"] if any(row is not None and row.first for row in step.pieces) else []
        calls += ["prefill"] if step.prefill else []
        calls += [("speculate" if step.burst.plan else "decode")] if step.burst else []
        assert (counts.calls, counts.sent, counts.read) == (calls, sent_by(step, name), read_from(step))
        assert (step.burst is None) or (step.burst.plan is not None) == speculates


def test_other_transfers_and_operations_are_noticed() -> None:
    """Each of these transfers is one that no step makes."""
    one, reads = jax.device_put(np.ones(3, np.float32)), list[int]()
    with reads_counted(reads.append):
        for read in (np.asarray, np.array, jax.device_get):
            read(one)
        one.tolist()
    assert reads == [12] * 4
    with no_other_work(), pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        jax.device_put(np.ones(3))
    with pytest.raises(AssertionError, match="a JAX operation ran outside the programs"), no_other_work():
        one + one

"""Measures the engine with SmolLM2 on a CPU: one request, a full batch, mixed lengths, a common prefix; and the host's work for a token.

    python benchmarks/engine.py [--against FOLDER] [--loads single full mixed prefix] [--turns 5] [--dtype bfloat16] [--new-tokens 64]
    python benchmarks/engine.py --host [--turns 5]
    python benchmarks/engine.py --start [--requests 2000]

``--against``: another checkout of l4jax, which takes turns with this one, each in a process of its own in the same environment. The median
of its times is divided by the median of ours, and the tokens are compared. The loads, with random prompts, greedy, 8 rows, no speculation:

- ``single``: one prompt of 16 tokens; ``full``: eight of them.
- ``mixed``: 64 prompts of 16 tokens, each with 16 to 512 new tokens.
- ``prefix``: 16 prompts that share their first 1,024 tokens and have 16 of their own, one new token each. Each turn has new prompts.

``--host``: the CPU time of the thread that drives the engine, for each token of 16 rows, in bursts of 1 and of 8 rounds. Waiting for
results takes no CPU time. ``ours`` is measured with programs that return at once what they returned before; the rest is dispatch. The model
has SmolLM2's layers, so that dispatch has as much to do, but is narrow: on a CPU the thread that dispatches may also compute, which counts
as dispatch here.

``--start``: seconds from the start of a process until all programs for 16 rows and the drafter are ready, for a first and a second
process; then how often JAX compiles while random requests with all sampling settings are answered.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

LOADS = ("single", "full", "mixed", "prefix")
ROWS = 8


def work(dtype: str, new_tokens: int) -> None:
    """A worker: reads the name of a load from each line, runs it, and prints seconds, the number of tokens, and the sum of their ids."""
    import numpy as np

    import l4jax
    from l4jax.smollm2 import ensure_checkpoint

    llm = l4jax.load(ensure_checkpoint(), dtype=dtype, speculation="off", max_batch=ROWS)
    rng = np.random.default_rng(0)

    def drawn(tokens: int) -> list[int]:
        return [int(token) for token in rng.integers(100, 40_000, tokens)]

    def params(tokens: int) -> l4jax.SamplingParams:
        return l4jax.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)

    prompts = [drawn(16) for _ in range(64)]
    lengths = [int(length) for length in rng.integers(16, 513, 64)]

    def requests(load: str) -> tuple[list[list[int]], list[l4jax.SamplingParams]]:
        if load == "prefix":
            common = drawn(1024)
            return [common + drawn(16) for _ in range(16)], [params(1)] * 16
        if load == "mixed":
            return prompts, [params(length) for length in lengths]
        rows = 1 if load == "single" else ROWS
        return prompts[:rows], [params(new_tokens)] * rows

    for line in sys.stdin:
        asked = requests(line.strip())
        start = time.perf_counter()
        completions = llm.generate(*asked)
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, sum(len(c.token_ids) for c in completions), sum(sum(c.token_ids) for c in completions)]), flush=True)


class Worker:
    """A process that runs loads with one checkout's code."""

    def __init__(self, checkout: Path, arguments: argparse.Namespace) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--dtype", arguments.dtype]
        command += ["--new-tokens", str(arguments.new_tokens)]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout)

    def run(self, load: str) -> tuple[float, int, int]:
        """Run a load. Returns seconds, the number of tokens, and the sum of their ids."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(load, file=self._process.stdin, flush=True)
        seconds, tokens, total = json.loads(self._process.stdout.readline())
        return seconds, tokens, total


def compare(arguments: argparse.Namespace) -> None:
    """Print each load's median time, and how many times as long the other checkout takes, if there is one."""
    checkouts = [Path(__file__).resolve().parents[1], *([arguments.against.resolve()] if arguments.against else [])]
    workers = [Worker(checkout, arguments) for checkout in checkouts]
    for load in arguments.loads:
        seconds: list[list[float]] = [[] for _ in workers]
        found: list[set[tuple[int, int]]] = [set() for _ in workers]
        for worker in workers:  # compiles
            worker.run(load)
        for turn in range(arguments.turns):
            order = range(len(workers))
            for i in order if turn % 2 else reversed(order):
                taken, *tokens = workers[i].run(load)
                seconds[i].append(taken)
                found[i].add((tokens[0], tokens[1]))
        medians = [statistics.median(each) for each in seconds]
        tokens_a_second = next(iter(found[0]))[0] / medians[0]
        line = f"{load:8} {medians[0]:8.3f} s {tokens_a_second:8.1f} tokens/s (median of {arguments.turns})"
        if arguments.against:
            # Both workers draw the same new prompts with a common prefix in each turn.
            same = "the same tokens" if found[0] == found[1] else "OTHER TOKENS"
            line += f"; the other {medians[1]:8.3f} s, {medians[1] / medians[0]:.3f} times as long; {same}"
        print(line, flush=True)


def host(turns: int) -> None:
    """Print the CPU time of the driving thread for each token."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    import l4jax
    from l4jax.checkpoints.store import open_checkpoint
    from l4jax.compiled import Program
    from l4jax.engine.engine import Engine
    from l4jax.model.llama import Llama
    from l4jax.model.weights import random_weights
    from l4jax.smollm2 import ensure_checkpoint

    rows, returned = 16, dict[tuple[str, int], Any]()
    sizes = {"hidden_size": 16, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "intermediate_size": 16, "vocab_size": 64}
    deep = open_checkpoint(ensure_checkpoint()).config
    config = dataclasses.replace(deep, **sizes, eos_token_ids=(), bos_token_id=None, pad_token_id=None)
    weights = random_weights(Llama(config), jax.random.key(0), jnp.dtype(jnp.float32))
    llm = l4jax.LLM(config, weights, max_batch=rows, kv_tokens=rows * 512)
    call: Callable[..., Any] = Program.__call__

    def kept(self: Program, *given: Any, **static: Any) -> Any:
        out = call(self, *given, **static)
        returned.setdefault((self.kind, llm.engine.options.long_steps), out)
        return out

    def at_once(self: Program, weights: Any, resident: Any, inputs: Any, **static: Any) -> Any:
        _, *out = returned[self.kind, llm.engine.options.long_steps]
        # New array objects, because JAX keeps the host's copy of an array that was read.
        return resident, *jax.tree.map(lambda leaf: leaf.addressable_data(0), out)

    def measured(turn: int, program: Callable[..., Any]) -> float:
        """CPU microseconds of the driving thread for each token, after the prompts are prefilled."""
        handles = [llm.add([turn, i, 7], l4jax.SamplingParams(max_tokens=401, temperature=0.0, ignore_eos=True)) for i in range(rows)]
        while not all(handle.tokens for handle in handles):
            llm.step()
        before, start = sum(len(handle.tokens) for handle in handles), time.thread_time()
        with mock.patch.object(Program, "__call__", program):
            while not all(len(handle.tokens) > 300 for handle in handles):
                llm.step()
            taken, after = time.thread_time() - start, sum(len(handle.tokens) for handle in handles)
        for handle in handles:
            handle.cancel()
        while llm.step():
            pass
        return taken / (after - before) * 1e6

    for steps in (1, 8):
        engine = llm.engine
        options = dataclasses.replace(engine.options, short_steps=steps, long_steps=steps)
        llm.engine = Engine(engine.runner, engine._memory, engine.shape, options, engine._tokenizer)
        measured(0, kept)  # compiles
        totals = [measured(turn, call) for turn in range(1, turns + 1)]
        ours = [measured(turn, at_once) for turn in range(1, turns + 1)]
        total, own = statistics.median(totals), statistics.median(ours)
        print(
            f"bursts of {steps} at {rows} rows: {total:.1f} us a token, {total - own:.1f} of them dispatch, {own:.1f} ours "
            f"(median of {turns})",
            flush=True,
        )


def start(requests: int) -> None:
    """Print how long a cold and a warm start take, and how often JAX compiles afterwards."""
    from l4jax.smollm2 import ensure_checkpoint

    checkpoint = ensure_checkpoint()
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache, "JAX_PLATFORMS": "cpu"}
        for number in (0, requests):
            command = [sys.executable, str(Path(__file__).resolve()), "--started", str(checkpoint), "--requests", str(number)]
            begun = time.time()
            subprocess.run([*command, "--begun", str(begun)], env=environment, check=True)


def started(checkpoint: str, begun: float, requests: int) -> None:
    """In a new process: compile or load all programs, then answer requests."""
    import jax
    import numpy as np

    import l4jax

    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
    )
    llm = l4jax.load(checkpoint, max_batch=16, kv_tokens=16 * 1024)
    llm.warmup()
    print(f"{len(llm.programs())} programs ready after {time.time() - begun:.1f} s; JAX compiled {len(compiled)} times", flush=True)
    compiled.clear()
    rng = np.random.default_rng(0)
    answered = 0
    while answered < requests:
        count = min(requests - answered, int(rng.integers(1, 33)))
        prompts = [rng.integers(0, llm.config.vocab_size, int(rng.integers(1, 60))).tolist() for _ in range(count)]
        params = [
            l4jax.SamplingParams(
                max_tokens=int(rng.integers(1, 8)),
                temperature=float(rng.choice([0.0, 0.8])),
                top_k=int(rng.choice([0, 5])),
                top_p=float(rng.choice([1.0, 0.9])),
                min_p=float(rng.choice([0.0, 0.1])),
                repetition_penalty=float(rng.choice([1.0, 1.2])),
                presence_penalty=float(rng.choice([0.0, 0.5])),
                frequency_penalty=float(rng.choice([0.0, 0.5])),
                logit_bias={int(token): 1.0 for token in rng.integers(0, 1000, int(rng.integers(0, 12)))},
                stop_token_ids=rng.integers(0, 1000, int(rng.integers(0, 12))).tolist(),
                stop=["e"] if rng.random() < 0.2 else [],
                ignore_eos=bool(rng.integers(2)),
                logprobs=None if rng.random() < 0.7 else int(rng.integers(0, 21)),
                seed=int(rng.integers(1 << 31)),
            )
            for _ in range(count)
        ]
        if rng.random() < 0.1:
            llm.score(prompts, top=3)
        answered += len(llm.generate(prompts, params))
    if requests:
        print(f"{answered} random requests; JAX compiled {len(compiled)} times", flush=True)


def machine() -> Iterator[str]:
    """Lines that say what this ran on."""
    import jax

    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    yield f"{os.cpu_count()} cores, {name}; jax {jax.__version__}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of l4jax to take turns with")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=64, help="of single and full (default: %(default)s)")
    parser.add_argument("--host", action="store_true", help="measure what the host does for a token instead")
    parser.add_argument("--start", action="store_true", help="measure how long all programs take to be ready instead")
    parser.add_argument("--requests", type=int, default=2000, help="with --start (default: %(default)s)")
    parser.add_argument("--started", help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.dtype, arguments.new_tokens)
        return
    if arguments.started:
        started(arguments.started, arguments.begun, arguments.requests)
        return
    for line in machine():
        print(line)
    if arguments.host:
        host(arguments.turns)
    elif arguments.start:
        start(arguments.requests)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()

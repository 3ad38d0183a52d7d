"""SmolLM2 on the CPU: l4jax beside transformers and llama.cpp, taking turns on one machine.

    python benchmarks/cpu_decode.py CHECKPOINT
        [--transformers PYTHON HF_FOLDER] [--llama-cpp PYTHON GGUF [GGUF ...]]

CHECKPOINT is a folder made by ``l4jax convert``. Each peer needs a Python interpreter that has it installed: torch and
transformers with the model as a Hugging Face folder; llama-cpp-python with GGUF files (flash attention is off, because
llama.cpp is faster without it on CPUs). Every system is loaded once in a process of its own and warmed up. Then all take
turns for ``--repetitions`` rounds at every length of prompts, so that a slow minute of a shared machine hits all of them.

Printed for each: the median, lowest and highest tokens/s of prefill and decode, the median milliseconds of a decode step, and
GB/s of weights read while decoding (weight bytes times steps per second: what a memory-bound decode is limited by); and how
many tokens agree with the first system's, counted in each row up to the first that differs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import platform
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from worker import Ready, Repetition, Work, Worker

PEERS = Path(__file__).parent / "peers"
VOCAB_SIZE = 49152


def commands(arguments: argparse.Namespace, batch: int) -> dict[str, list[str]]:
    """The worker to start for each system, by the name it is printed under."""
    capacity = max(arguments.prompt_tokens) + arguments.new_tokens + 1
    sizes = ["--capacity", capacity, "--batch", batch, "--threads", arguments.threads]
    systems = {
        f"l4jax {dtype}": [sys.executable, PEERS / "l4jax_decode.py", arguments.checkpoint, "--dtype", dtype]
        for dtype in ("float32", "bfloat16")
    }
    if arguments.transformers:
        python, folder = arguments.transformers
        for dtype in ("float32", "bfloat16"):
            systems[f"transformers {dtype}"] = [python, PEERS / "transformers_decode.py", folder, "--dtype", dtype]
    if arguments.llama_cpp:
        python, *files = arguments.llama_cpp
        for file in files:
            systems[f"llama.cpp {Path(file).stem}"] = [python, PEERS / "llama_cpp_decode.py", file]
    return {name: [str(word) for word in (*command, *sizes)] for name, command in systems.items()}


def prompts(batch: int, tokens: int) -> list[list[int]]:
    """Random token ids, [batch][tokens]; special tokens at either end are left out."""
    return np.random.default_rng(0).integers(100, VOCAB_SIZE - 100, (batch, tokens)).tolist()


def row(name: str, rates: list[float]) -> str:
    return f"{name:>9} {statistics.median(rates):8.1f} ({min(rates):.1f} to {max(rates):.1f})"


def same_tokens(one: Repetition, other: Repetition) -> int:
    """Tokens before the first that differs, over all rows. At the same precision, systems differ only where two tokens nearly tie."""
    pairs = [zip(a, b, strict=True) for a, b in zip(one.token_ids, other.token_ids, strict=True)]
    return sum(len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], row))) for row in pairs)


def measure(arguments: argparse.Namespace, batch: int) -> None:
    """Print the tables of one batch size, one for each length of prompts."""
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(command)) for name, command in commands(arguments, batch).items()}
        for tokens in arguments.prompt_tokens:
            results: dict[str, list[Repetition]] = {name: [] for name in workers}
            work = Work(prompts(batch, tokens), arguments.new_tokens)
            for repetition in range(arguments.repetitions + 1):
                for name, worker in workers.items():
                    found = worker.run(work)
                    if repetition > 0:  # the first warms up
                        results[name].append(found)
            print(f"\nbatch {batch}, prompt {tokens}, {arguments.new_tokens} new tokens, {arguments.threads} threads")
            report(results, {name: worker.ready for name, worker in workers.items()}, work)


def report(results: dict[str, list[Repetition]], ready: dict[str, Ready], work: Work) -> None:
    """Print a line for each system."""
    batch = len(work.prompts)
    first = next(iter(results.values()))[0]
    for name, repetitions in results.items():
        prefill = [batch * len(work.prompts[0]) / r.prefill_seconds for r in repetitions]
        decode = [batch * work.new_tokens / r.decode_seconds for r in repetitions]
        steps_per_second = statistics.median(decode) / batch
        step = f"{1e3 / steps_per_second:7.2f} ms a step  {ready[name].weight_bytes * steps_per_second / 1e9:6.1f} GB/s"
        same = f"{same_tokens(repetitions[0], first):4d} same"
        print(f"{name:28} {row('prefill', prefill)}  {row('decode', decode)}  {step}  {same}  [{ready[name].library}]", flush=True)


def main() -> None:
    """Parse the command line and measure each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--transformers", nargs=2, metavar=("PYTHON", "HF_FOLDER"))
    parser.add_argument("--llama-cpp", nargs="+", metavar=("PYTHON", "GGUF"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[16, 512, 1500], help="lengths of prompts")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), platform.processor())
    print(f"{model}, medians of {arguments.repetitions} (lowest to highest), tokens/s over all rows")
    for batch in arguments.batch:
        measure(arguments, batch)


if __name__ == "__main__":
    main()

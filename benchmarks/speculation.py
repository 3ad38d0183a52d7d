"""Measures speculation with SmolLM2 on a CPU: acceptance and speed of chains and trees, beside decoding one by one.

    python benchmarks/speculation.py CHECKPOINT [--drafter DRAFTER] [--batch 1 4 8] [--dtype float32 bfloat16]
        [--transformers PYTHON HF_FOLDER] [--llama-cpp PYTHON] [--gguf F32 BF16]
        [--llama-speculative BINARY] [--drafter-gguf F32 BF16]

CHECKPOINT is a folder made by ``l4jax convert``, with a drafter in it unless ``--drafter`` gives one. 41 prompts of four kinds that no
drafter was trained on (``benchmarks/data/speculation_prompts.jsonl``) are answered greedily. Every plan answers a prompt before the next
prompt starts, so that a slow minute of a shared machine affects all plans. Every plan's tokens are compared with those of decoding one
by one.

With a batch of one, transformers and llama.cpp take their turns too (``benchmarks/cpu_decode.py`` says how to install them), and
llama.cpp with the same drafter: build ``llama-speculative-simple`` from its sources, which are in llama-cpp-python's source package;
export the drafter with ``l4jax export DRAFTER FOLDER --to eagle`` and convert it with llama.cpp's ``convert_hf_to_gguf.py FOLDER
--target-model-dir HF_FOLDER --outtype f32``. These peers continue past an answer's end, up to the same number of tokens.

Printed for each plan: the acceptance length (tokens a round, including the one that every round yields), by kind of prompt; the share of
rounds in which a token at each depth was accepted; the median over prompts (or batches) of tokens/s; and its ratio to the first plan's.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from worker import Work, Worker

import l4jax

PEERS = Path(__file__).parent / "peers"
DTYPES = ("float32", "bfloat16")
PROMPTS = Path(__file__).parent / "data" / "speculation_prompts.jsonl"
PLANS = ["off", "chain:1", "chain:3", "chain:5", "chain:7", "tree:eagle26"]
PLANS += ["dynamic:steps=3,topk=3,nodes=8", "dynamic:steps=5,topk=4,nodes=8", "dynamic:steps=5,topk=4,nodes=26"]


@dataclasses.dataclass
class Result:
    """What one plan did with one batch."""

    token_ids: list[list[int]]
    seconds: float
    rounds: int
    accepted: tuple[int, ...]
    by_prompt: list[float]


def answer(llm: l4jax.LLM, prompts: list[list[int]], new_tokens: int) -> Result:
    """Answer one batch. Prefill and first token are not timed: they are the same for every plan."""
    params = l4jax.SamplingParams(max_tokens=new_tokens, temperature=0.0)
    handles = [llm.add(tokens, params) for tokens in prompts]
    while not all(handle.tokens for handle in handles):
        llm.step()
    start = time.perf_counter()
    while llm.step():
        pass
    seconds = time.perf_counter() - start
    completions = [handle.completion for handle in handles if handle.completion is not None]
    each = [completion.stats for completion in completions]
    accepted = tuple(map(sum, itertools.zip_longest(*(stats.accepted for stats in each), fillvalue=0)))
    rates = [stats.acceptance_length for stats in each]
    return Result([c.token_ids for c in completions], seconds, sum(stats.rounds for stats in each), accepted, rates)


def peers(arguments: argparse.Namespace, dtype: str) -> dict[str, Callable[[list[int], str], float]]:
    """For each other system, by name, a function from a prompt's tokens and text to its decode rate in tokens/s; greedy, in this dtype."""
    sizes = ["--capacity", "2048", "--threads", str(arguments.threads)]
    found: dict[str, Callable[[list[int], str], float]] = {}

    def rate_of(*command: str) -> Callable[[list[int], str], float]:
        worker = Worker([*command, *sizes])
        return lambda tokens, _: arguments.new_tokens / worker.run(Work([tokens], arguments.new_tokens)).decode_seconds

    if arguments.transformers:
        python, folder = arguments.transformers
        found["transformers"] = rate_of(python, str(PEERS / "transformers_decode.py"), folder, "--dtype", dtype)
    gguf = arguments.gguf and arguments.gguf[DTYPES.index(dtype)]
    if arguments.llama_cpp:
        found["llama.cpp"] = rate_of(arguments.llama_cpp, str(PEERS / "llama_cpp_decode.py"), gguf)
    if arguments.llama_speculative:
        drafter = arguments.drafter_gguf[DTYPES.index(dtype)]
        for most in (3, 5):
            command = [arguments.llama_speculative, "-m", gguf, "-md", drafter, "--spec-type", "draft-eagle3", "--spec-draft-n-max", most]
            command += ["-n", arguments.new_tokens, "--temp", 0, "--top-k", 1, "-t", arguments.threads, "-td", arguments.threads]
            command += ["-c", 2048, "-fa", "off"]
            found[f"llama.cpp eagle3, up to {most}"] = functools.partial(llama_speculative, [str(word) for word in command])
    return found


def llama_speculative(command: list[str], _: list[int], text: str) -> float:
    """The tokens/s that ``llama-speculative-simple`` reports for one prompt."""
    done = subprocess.run([*command, "-p", text], check=True, capture_output=True, text=True)
    (rate,) = re.findall(r"decoded +[0-9]+ tokens in +[0-9.]+ seconds, speed: +([0-9.]+) t/s", done.stdout + done.stderr)
    return float(rate)


def measure(arguments: argparse.Namespace, dtype: str, size: int, questions: list[dict]) -> None:
    """Print the table of one dtype and batch size."""
    options = {"dtype": dtype, "max_batch": size, **({"drafter": arguments.drafter} if arguments.drafter else {})}
    models = {plan: l4jax.load(arguments.checkpoint, speculation=plan, **options) for plan in arguments.plans}
    (first, *_) = models.values()
    assert first.chat_format is not None
    encoded = [first.chat_format.encode(question["messages"]) for question in questions]
    groups = [range(i, min(i + size, len(encoded))) for i in range(0, len(encoded), size)]
    others = peers(arguments, dtype) if size == 1 else {}
    results: dict[str, list[Result]] = {plan: [] for plan in models}
    rates_of_others: dict[str, list[float]] = {name: [] for name in others}
    for number, group in enumerate((groups[0], *groups)):
        for plan, llm in models.items():
            result = answer(llm, [encoded[i] for i in group], arguments.new_tokens)
            if number > 0:  # the first group runs twice: the first run compiles
                results[plan].append(result)
        for name, decode in others.items():
            rate = decode(encoded[group[0]], first.chat_format.render(questions[group[0]]["messages"]))
            if number > 0:
                rates_of_others[name].append(rate)
    print(f"\n{dtype}, batch {size}, up to {arguments.new_tokens} new tokens")
    report(results, rates_of_others, questions)


def report(results: dict[str, list[Result]], rates_of_others: dict[str, list[float]], questions: list[dict]) -> None:
    """Print a line for each plan and peer, then the answers that differ from the first plan's."""
    kinds = list(dict.fromkeys(question["kind"] for question in questions))
    print(
        f"{'plan':34} {'length':>6}  {' '.join(f'{kind:>11}' for kind in kinds)}  {'tokens/s':>8} {'ratio':>6}  accepted at depth 1, 2, ..."
    )
    plain_rate = 0.0
    for plan, found in results.items():
        rate = statistics.median(sum(len(row) - 1 for row in r.token_ids) / r.seconds for r in found if r.seconds > 0)
        plain_rate = plain_rate or rate
        rounds = sum(r.rounds for r in found)
        accepted = [sum(column) for column in zip(*(r.accepted for r in found), strict=True)]
        lengths = [length for r in found for length in r.by_prompt]
        of_kind = [statistics.mean(n for n, q in zip(lengths, questions, strict=True) if q["kind"] == kind) for kind in kinds]
        length = 1 + sum(accepted) / rounds if rounds else 1.0
        shares = " ".join(f"{n / rounds:.2f}" for n in accepted)
        columns = " ".join(f"{value:11.2f}" for value in of_kind)
        print(f"{plan:34} {length:6.2f}  {columns}  {rate:8.1f} {rate / plain_rate:6.2f}  {shares}")
    for name, rates in rates_of_others.items():
        rate = statistics.median(rates)
        print(f"{name:34} {'':6}  {' ' * (12 * len(kinds) - 1)}  {rate:8.1f} {rate / plain_rate:6.2f}")
    first, *_ = results
    plain = [row for r in results[first] for row in r.token_ids]
    for plan, found in results.items():
        rows = [row for r in found for row in r.token_ids]
        different = [i for i, (a, b) in enumerate(zip(rows, plain, strict=True)) if a != b]
        if different:
            print(f"{plan}: {len(different)} of {len(plain)} answers differ from {first}'s (prompts {different})")


def main() -> None:
    """Parse the command line and measure each dtype and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--drafter")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=None, help="answer only this many of the prompts, evenly from all kinds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--transformers", nargs=2, metavar=("PYTHON", "HF_FOLDER"))
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--gguf", nargs=2, metavar=("F32", "BF16"), help="the model for llama.cpp")
    parser.add_argument("--llama-speculative", metavar="BINARY", help="llama-speculative-simple")
    parser.add_argument("--drafter-gguf", nargs=2, metavar=("F32", "BF16"), help="the drafter for it")
    arguments = parser.parse_args()
    if (arguments.llama_cpp or arguments.llama_speculative) and not arguments.gguf:
        parser.error("llama.cpp needs --gguf")
    if bool(arguments.llama_speculative) != bool(arguments.drafter_gguf):
        parser.error("--llama-speculative and --drafter-gguf go together")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    questions = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    if arguments.prompts is not None:
        step = len(questions) / arguments.prompts
        questions = [questions[int(i * step)] for i in range(arguments.prompts)]
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), platform.processor())
    print(f"{model}, {arguments.threads} threads, {len(questions)} prompts, medians over batches")
    for dtype in arguments.dtype:
        for size in arguments.batch:
            measure(arguments, dtype, size, questions)


if __name__ == "__main__":
    main()

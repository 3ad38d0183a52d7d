"""Speculation on SmolLM2 and the CPU: acceptance and speed of chains and trees, beside decoding one by one.

    python benchmarks/speculation.py CHECKPOINT [--drafter DRAFTER] [--batch 1 4 8] [--dtype float32 bfloat16]

CHECKPOINT is a folder made by ``l4jax convert``, with a drafter in it unless one is given. 41 prompts of four kinds that no drafter was
trained with (``benchmarks/data/speculation_prompts.jsonl``) are answered greedily, each by every plan in turn before the next, so that
a slow minute of a shared machine hits all of them. Every plan's tokens are compared with those of decoding one by one.

Printed for each plan: the acceptance length (tokens a round, the one that every step gives included), by kind of prompt; the share of
rounds in which a token at each depth stood; the median over prompts (or batches) of tokens/s; and that rate over the one without.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from pathlib import Path

import l4jax
from l4jax.batch import Batch, Request

PROMPTS = Path(__file__).parent / "data" / "speculation_prompts.jsonl"
PLANS = ["off", "chain:3", "chain:5", "chain:7", "tree:eagle26", "dynamic:steps=5,topk=4,nodes=8", "dynamic:steps=5,topk=4,nodes=26"]


@dataclasses.dataclass
class Result:
    """What one plan did with one batch."""

    token_ids: list[list[int]]
    seconds: float
    rounds: int
    accepted: tuple[int, ...]
    by_prompt: list[float]


def answer(llm: l4jax.LLM, prompts: list[list[int]], new_tokens: int) -> Result:
    """Prefill and first token are not timed: they are the same."""
    params = l4jax.SamplingParams(max_tokens=new_tokens, temperature=0.0)
    ends = sorted(set(llm.config.eos_token_ids) | set(llm.chat_format.stop_token_ids if llm.chat_format else ()))
    batch = Batch(llm.runner, [Request(tokens, params, 0, ends) for tokens in prompts])
    rows = [new.token_ids for new in batch.step(1)]
    start = time.perf_counter()
    while not all(batch.done):
        for row, new in zip(rows, batch.step(32), strict=True):
            row += new.token_ids
    seconds = time.perf_counter() - start
    lengths = [1 + sum(r.accepted) / r.rounds if r.rounds else 1.0 for r in batch.rounds]
    accepted = tuple(map(sum, zip(*(r.accepted for r in batch.rounds), strict=True)))
    return Result(rows, seconds, sum(r.rounds for r in batch.rounds), accepted, lengths)


def measure(arguments: argparse.Namespace, dtype: str, size: int, questions: list[dict]) -> None:
    """Print the table of one dtype and batch size."""
    options = {"dtype": dtype, "max_batch": size, **({"drafter": arguments.drafter} if arguments.drafter else {})}
    models = {plan: l4jax.load(arguments.checkpoint, speculation=plan, **options) for plan in arguments.plans}
    (first, *_) = models.values()
    assert first.chat_format is not None
    encoded = [first.chat_format.encode(question["messages"]) for question in questions]
    groups = [range(i, min(i + size, len(encoded))) for i in range(0, len(encoded), size)]
    results: dict[str, list[Result]] = {plan: [] for plan in models}
    for number, group in enumerate((groups[0], *groups)):
        for plan, llm in models.items():
            result = answer(llm, [encoded[i] for i in group], arguments.new_tokens)
            if number > 0:  # the first is repeated: it compiled
                results[plan].append(result)
    print(f"\n{dtype}, batch {size}, up to {arguments.new_tokens} new tokens")
    kinds = list(dict.fromkeys(question["kind"] for question in questions))
    print(f"{'plan':34} {'length':>6}  {' '.join(f'{kind:>11}' for kind in kinds)}  {'tokens/s':>8} {'ratio':>6}  stood at depth 1, 2, ...")
    plain_rate = 0.0
    for plan, found in results.items():
        rates = [sum(len(row) - 1 for row in r.token_ids) / r.seconds for r in found if r.seconds > 0]
        rate = statistics.median(rates)
        plain_rate = plain_rate or rate
        rounds = sum(r.rounds for r in found)
        accepted = [sum(column) for column in zip(*(r.accepted for r in found), strict=True)]
        lengths = [length for r in found for length in r.by_prompt]
        of_kind = [statistics.mean(n for n, q in zip(lengths, questions, strict=True) if q["kind"] == kind) for kind in kinds]
        length = 1 + sum(accepted) / rounds if rounds else 1.0
        stood = " ".join(f"{n / rounds:.2f}" for n in accepted)
        columns = " ".join(f"{value:11.2f}" for value in of_kind)
        print(f"{plan:34} {length:6.2f}  {columns}  {rate:8.1f} {rate / plain_rate:6.2f}  {stood}")
    plain = [row for r in next(iter(results.values())) for row in r.token_ids]
    for plan, found in results.items():
        rows = [row for r in found for row in r.token_ids]
        different = [i for i, (a, b) in enumerate(zip(rows, plain, strict=True)) if a != b]
        if different:
            print(f"{plan}: {len(different)} of {len(plain)} answers differ from {arguments.plans[0]}'s (prompts {different})")


def main() -> None:
    """Parse the command line and measure each dtype and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--drafter")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=None, help="only so many of the prompts, of each kind alike")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    questions = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    if arguments.prompts is not None:
        step = len(questions) / arguments.prompts
        questions = [questions[int(i * step)] for i in range(arguments.prompts)]
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), platform.processor())
    print(f"{model}, {len(questions)} prompts, medians over batches")
    for dtype in arguments.dtype:
        for size in arguments.batch:
            measure(arguments, dtype, size, questions)


if __name__ == "__main__":
    main()

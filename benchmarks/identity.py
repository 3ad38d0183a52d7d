"""Whether SmolLM2's requests get to the last bit what they get alone, in deterministic mode: tokens and log-probabilities.

    python benchmarks/identity.py [--requests 300] [--speculation off chain:3 tree:eagle26] [--new-tokens 96] [--dtype float32]

Prompts of 10 to 1,500 tokens, at temperatures 0 and 1. Each is answered alone, with nothing cached; then all are asked for at once (16
under way, in a cache that is too small for them, so some wait in host memory); and once more, when many find their beginning in the cache.
A line for each way to speculate says how many of the answers were equal, and how often what could have made a difference came up.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import l4jax
from l4jax import LLM, Completion, SamplingParams
from l4jax.engine.step import Step
from l4jax.smollm2 import ensure_checkpoint

ROWS, KV_TOKENS = 16, 6144
QUESTIONS = Path(__file__).parent / "data" / "speculation_prompts.jsonl"


def prompts(llm: LLM, count: int) -> list[list[int]]:
    """Beginnings of texts made of questions in random order: some begin as others do."""
    assert llm.tokenizer is not None
    asked = [json.loads(line)["messages"][-1]["content"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    dice, found = random.Random(0), []
    for _ in range(count):
        text, order = random.Random(dice.randrange(max(1, count // 3))), asked.copy()
        text.shuffle(order)
        length = round(math.exp(dice.uniform(math.log(10), math.log(1500))))
        found.append((llm.tokenizer.encode("\n".join(order)) * 3)[:length])
    return found


def watch(llm: LLM, seen: Counter[str]) -> None:
    """Count hits, saved sequences and bursts of several rows."""
    runner = llm.engine.runner
    dispatch = runner.dispatch

    def watched(step: Step, requests: Any) -> Any:
        seen["hits"] += sum(row is not None and row.first and row.start > 0 for row in step.pieces)
        seen["saved"] += len(step.saves)
        seen["bursts of several"] += sum(row is not None for row in step.rows) > 1
        return dispatch(step, requests)

    runner.dispatch = watched  # type: ignore[method-assign]  # of this object alone


def equal(a: Completion, b: Completion) -> bool:
    """Whether tokens and log-probabilities are the same."""
    return (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)


def main() -> int:
    """Parse the command line, and print a line for each way to speculate; 1 if any answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--speculation", nargs="+", default=["off", "chain:3", "tree:eagle26"])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    checkpoint, differ = ensure_checkpoint(), 0
    for speculation in arguments.speculation:
        begun = time.perf_counter()
        options = {"max_batch": ROWS, "kv_tokens": KV_TOKENS, "prefill_lengths": (128,), "deterministic": True}
        llm = l4jax.load(checkpoint, dtype=arguments.dtype, speculation=speculation, **options)
        asked = prompts(llm, arguments.requests)
        params = [
            SamplingParams(max_tokens=arguments.new_tokens, temperature=i % 2, seed=i, logprobs=1, ignore_eos=True)
            for i in range(len(asked))
        ]
        alone = []
        for prompt, of_prompt in zip(asked, params, strict=True):
            llm.engine.discard()
            alone += llm.generate([prompt], of_prompt)
        llm.engine.discard()
        seen = Counter[str]()
        watch(llm, seen)
        together = [llm.generate(asked, params) for _ in range(2)]
        found = [sum(map(equal, alone, answers)) for answers in together]
        differ += 2 * len(asked) - sum(found)
        print(
            f"{arguments.dtype}, {speculation}: {found[0]} and {found[1]} of {len(asked)} are equal; "
            f"{', '.join(f'{count} {what}' for what, count in seen.items())}; {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())

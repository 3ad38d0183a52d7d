"""Whether SmolLM2's requests get what they get alone, whatever else the engine runs.

    python benchmarks/identity.py [--not-deterministic] [--requests 300] [--after 0] [--speculation off chain:3 tree:eagle26]
        [--new-tokens 96] [--dtype float32]

Prompts of 10 to 1,500 tokens, at temperatures 0 and 1. Each is answered alone, with nothing cached; then all are asked for at once, and
then once more, when the cache holds the beginnings of many. Now and then the newest request under way is preempted, as if pages ran out.

In deterministic mode tokens and log-probabilities must be equal to those of the same plan alone. With ``--not-deterministic``, tokens are
compared with those that a request gets alone without speculation. Each answer that differs is listed, with how far the two tokens' scores
(logit / temperature + noise; at temperature 0 the logits, divided by the largest) are apart where it first does: at most 1e-5, or it fails.

A plan may take hours: ``--after`` leaves out the first prompts, so that several runs take some each.

A line for each plan says how many answers were equal, and how often what could have made a difference happened.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import l4jax
from l4jax import LLM, Completion, SamplingParams
from l4jax.decoding.randomness import Purpose, gumbel, stream_keys
from l4jax.engine.scheduler import Scheduler
from l4jax.engine.sequence import Sequence
from l4jax.engine.step import Step, StepDraft
from l4jax.smollm2 import ensure_checkpoint

ROWS, KV_TOKENS, TEXTS = 16, 6144, 100
PREEMPTION = 0.2  # of the times that a request reserves pages
NEAR = 1e-5
QUESTIONS = Path(__file__).parent / "data" / "speculation_prompts.jsonl"


def prompts(llm: LLM, count: int) -> list[list[int]]:
    """Beginnings of texts made of questions in random order; some texts begin alike."""
    assert llm.tokenizer is not None
    asked = [json.loads(line)["messages"][-1]["content"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    dice, found = random.Random(0), []
    for _ in range(count):
        text, order = random.Random(dice.randrange(TEXTS)), asked.copy()
        text.shuffle(order)
        length = round(math.exp(dice.uniform(math.log(10), math.log(1500))))
        found.append((llm.tokenizer.encode("\n".join(order)) * 3)[:length])
    return found


def watch(llm: LLM, seen: Counter[str]) -> None:
    """Count prefix hits, preemptions, bursts of several requests and rounds of speculation."""
    runner = llm.engine.runner
    dispatch = runner.dispatch
    begun: set[int] = set()

    def watched(step: Step, requests: Any) -> Any:
        first = {row.request for row in step.pieces if row is not None and row.first}
        seen["hits"] += sum(row is not None and row.first and row.start > 0 for row in step.pieces)
        seen["preempted"] += len(step.saves) + len(first & begun)
        seen["bursts of several"] += sum(row is not None for row in step.rows) > 1
        seen["bursts that speculate"] += step.burst is not None and step.burst.plan is not None
        begun.update(first)
        return dispatch(step, requests)

    runner.dispatch = watched  # type: ignore[method-assign]  # of this object alone


def force_preemption() -> None:
    """Let every scheduler preempt its newest request now and then, when an older one reserves pages."""
    reserve, dice = Scheduler._reserve, random.Random(1)

    def reserved(self: Scheduler, draft: StepDraft, sequence: Sequence, start: int, end: int) -> bool:
        rank = self.ranks[sequence.rank]
        newest = rank.active[-1]
        if newest is not sequence and not draft.has(newest) and dice.random() < PREEMPTION:
            self._preempt(draft, rank, newest)
        return reserve(self, draft, sequence, start, end)

    Scheduler._reserve = reserved  # type: ignore[method-assign]  # for this benchmark


def apart(llm: LLM, prompt: list[int], params: SamplingParams, a: Completion, b: Completion) -> tuple[int, float]:
    """Where two answers first differ, and how far the scores of their tokens are from the highest one."""
    at = next(i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if x != y)
    tokens = [a.token_ids[at], b.token_ids[at]]
    score_V = llm.logits([[*prompt, *a.token_ids[:at]]])[0][-1].astype(np.float64)
    if params.temperature == 0:
        score_V /= np.abs(score_V).max()
    else:
        assert params.seed is not None
        seed_B2 = jnp.array([[params.seed >> 32, params.seed & 0xFFFFFFFF]], jnp.uint32)
        keys_B2 = stream_keys(seed_B2, jnp.array([at], jnp.int32), Purpose.TOKEN)
        score_V = score_V / params.temperature + np.asarray(gumbel(keys_B2, jnp.arange(len(score_V), dtype=jnp.int32)), np.float64)[0]
    return at, float(score_V.max() - score_V[tokens].min())


def main() -> int:
    """Parse the command line, and print a line for each way to speculate; 1 if any answer is not what it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--not-deterministic", action="store_true")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--after", type=int, default=0, help="leave out this many prompts (default: %(default)s)")
    parser.add_argument("--speculation", nargs="+", default=["off", "chain:3", "tree:eagle26"])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    deterministic = not arguments.not_deterministic
    force_preemption()
    load = functools.partial(
        l4jax.load,
        ensure_checkpoint(),
        dtype=arguments.dtype,
        max_batch=ROWS,
        kv_tokens=KV_TOKENS,
        prefill_lengths=(128,) if deterministic else None,
        deterministic=deterministic,
    )
    plain = load(speculation="off")
    numbers = range(arguments.after, arguments.after + arguments.requests)
    asked = prompts(plain, numbers.stop)[arguments.after :]
    params = [SamplingParams(max_tokens=arguments.new_tokens, temperature=i % 2, seed=i, logprobs=1, ignore_eos=True) for i in numbers]

    def all_alone(llm: LLM) -> list[Completion]:
        alone = []
        for prompt, of_prompt in zip(asked, params, strict=True):
            llm.engine.discard()
            alone += llm.generate([prompt], of_prompt)
        llm.engine.discard()
        return alone

    bad, alone = 0, [] if deterministic else all_alone(plain)
    for speculation in arguments.speculation:
        begun = time.perf_counter()
        llm = plain if speculation == "off" else load(speculation=speculation)
        alone = all_alone(llm) if deterministic else alone
        seen = Counter[str]()
        watch(llm, seen)
        equal = []
        for _ in range(2):
            found = llm.generate(asked, params)
            if deterministic:
                equal.append(sum((a.token_ids, a.logprobs) == (b.token_ids, b.logprobs) for a, b in zip(alone, found, strict=True)))
                bad += len(asked) - equal[-1]
                continue
            differ = [i for i in range(len(asked)) if alone[i].token_ids != found[i].token_ids]
            equal.append(len(asked) - len(differ))
            for i in differ:
                at, gap = apart(plain, asked[i], params[i], alone[i], found[i])
                bad += gap > NEAR
                print(
                    f"  {speculation}, request {numbers[i]}, {len(asked[i])} tokens, temperature {params[i].temperature:g}: token {at} of "
                    f"{arguments.new_tokens} differs, scores {gap:.1e} apart",
                    flush=True,
                )
        print(
            f"{arguments.dtype}, {speculation}: {equal[0]} and {equal[1]} of {len(asked)} are equal; "
            f"{', '.join(f'{count} {what}' for what, count in seen.items() if count)}; {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

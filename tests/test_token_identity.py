"""Speculation gives the tokens of decoding one by one, for many prompts. Where it does not, two tokens had nearly the same score."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import l4jax
from l4jax import LLM, Completion, SamplingParams
from tests.decoding.noise import token_noise
from tests.tiny import drafter, few_tokens, loaded_drafter, maverick_like, prompts, scout_like, weights, with_options

PLANS = ("chain:5", "tree:eagle26", "dynamic:steps=5,topk=4,nodes=16")
KINDS = {"greedy": {"temperature": 0.0}, "seeded": {"temperature": 1.0}}
QUESTIONS = Path(__file__).parents[1] / "benchmarks" / "data" / "speculation_prompts.jsonl"
# Sums in float32 are taken in another order for a tree than for one token.
GAP = 1e-5


def gap(llm: LLM, prompt: Sequence[int], a: Completion, b: Completion, params: SamplingParams) -> float:
    """The gap between two answers' first different tokens, in perturbed logits; at temperature 0 in logits, divided by the largest."""
    at = next(i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if x != y)
    tokens = [a.token_ids[at], b.token_ids[at]]
    logits_V = llm.logits([[*prompt, *a.token_ids[:at]]])[0][-1].astype(np.float64)
    if params.temperature == 0:
        return float((logits_V.max() - logits_V[tokens].min()) / np.abs(logits_V).max())
    assert params.seed is not None
    score_V = logits_V / params.temperature + token_noise(params.seed, at, len(logits_V))
    return float(score_V.max() - score_V[tokens].min())


def answers(llm: LLM, asked: Sequence[Sequence[int]], params: Sequence[SamplingParams], batch: int) -> list[Completion]:
    return [
        completion
        for start in range(0, len(asked), batch)
        for completion in llm.generate(asked[start : start + batch], params[start : start + batch])
    ]


def check(
    make: Callable[[str], LLM],
    asked: list[list[int]],
    kinds: Sequence[str],
    batches: Sequence[int],
    new_tokens: int,
    plans: Sequence[str] = ("off", *PLANS),
) -> None:
    """These plans in all batch sizes against one token a pass, alone; the prompts' kinds take turns."""
    params = [SamplingParams(max_tokens=new_tokens, seed=i, **KINDS[kinds[i % len(kinds)]]) for i in range(len(asked))]
    plain = make("off")
    expected = answers(plain, asked, params, 1)
    for plan in plans:
        llm = make(plan)
        for batch in batches:
            found = answers(llm, asked, params, batch)
            drafts = sum(sum(c.stats.accepted) for c in found)
            assert plan == "off" or drafts > 0
            parted = 0
            for prompt, a, b, of_prompt in zip(asked, expected, found, params, strict=True):
                if a.token_ids != b.token_ids:
                    parted += 1
                    apart = gap(plain, prompt, a, b, of_prompt)
                    print(f"{plan}, batch {batch}, seed {of_prompt.seed}: {a.token_ids} and {b.token_ids}, {apart:.1e} apart")
                    assert apart < GAP
            print(f"{plan}, batch {batch}, {' and '.join(kinds)}: {parted} of {len(asked)} answers part")
            assert parted <= max(1, len(asked) / 200)


@pytest.mark.many_prompts
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [scout_like, maverick_like])
def test_tiny_models(many_prompts: int, make: Callable, kind: str) -> None:
    config = few_tokens(make)
    made, draft = weights(config), loaded_drafter(drafter(config, aux_layers=(0, 1, 2)))
    lengths = tuple(np.random.default_rng(0).integers(2, 60, many_prompts).tolist())
    check(lambda plan: LLM(config, made, drafter=draft, speculation=plan, max_batch=8), prompts(config, lengths), [kind], (1, 8), 32)


def conversations() -> Iterator[list[dict[str, str]]]:
    """200 of them: each question that no drafter was trained with, asked in five ways."""
    questions = [json.loads(line)["messages"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    for way in ("", "In one sentence. ", "For a child of ten. ", "As a poem. ", "In French. "):
        for *before, last in questions[:40]:
            yield [*before, {**last, "content": way + last["content"]}]


def test_smollm2(smollm2_checkpoint: Path) -> None:
    """Greedy and seeded rows in one batch, with a tree that changes from round to round."""
    check_smollm2(smollm2_checkpoint, 8, (*KINDS,), (4,), 16, PLANS[2:])


@pytest.mark.many_prompts
@pytest.mark.parametrize("kind", KINDS)
def test_smollm2_over_many_prompts(smollm2_checkpoint: Path, many_prompts: int, kind: str) -> None:
    check_smollm2(smollm2_checkpoint, many_prompts, [kind], (1, 8), 32, ("off", *PLANS))


def check_smollm2(
    checkpoint: Path, count: int, kinds: Sequence[str], batches: Sequence[int], new_tokens: int, plans: Sequence[str]
) -> None:
    def load(plan: str) -> LLM:
        """Few programs: nearly every prompt is prefilled in one piece, and bursts have rows of padding when some have ended."""
        rows = max(batches) if plan in plans else 1
        llm = l4jax.load(checkpoint, dtype="float32", speculation=plan, max_batch=rows, prefill_lengths=(128,))
        return with_options(llm, row_buckets=(1, rows) if 1 in batches else (rows,), piece_rows=(1, rows))

    models = {plan: load(plan) for plan in {"off", *plans}}
    chat_format = models["off"].chat_format
    assert chat_format is not None
    asked = [chat_format.encode(messages) for messages in conversations()]
    check(models.__getitem__, asked[:: len(asked) // count][:count], kinds, batches, new_tokens, plans)

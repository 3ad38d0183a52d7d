"""Lets a chat model write prompts itself, to train a drafter if you have no others.

    python benchmarks/own_prompts.py smollm2 20000 > prompts.jsonl

A chat model that is given the beginning of a user's turn continues it with what users ask, as in its training data (Magpie, arXiv
2406.08464). TARGET is a folder made by `l4jax convert`. On one machine, the same count and seed give the same prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator

from drafter_prompts import TEMPERATURES

import l4jax
from l4jax import LLM, SamplingParams


def main() -> None:
    """Print the prompts, one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="the model: a folder made by l4jax convert")
    parser.add_argument("count", type=int, help="prompts that the model writes; those that are cut off or repeated are left out")
    parser.add_argument("--temperature", type=float, default=0.9, help="temperature at which prompts are drawn (default: 0.9)")
    parser.add_argument("--max-tokens", type=int, default=80, help="most tokens of a prompt (default: 80)")
    parser.add_argument("--batch", type=int, default=16, help="prompts written together (default: 16)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype to hold the model in (default: as stored)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    llm = l4jax.load(arguments.target, dtype=arguments.dtype, speculation="off", max_batch=arguments.batch)
    params = [
        SamplingParams(temperature=arguments.temperature, max_tokens=arguments.max_tokens, seed=(arguments.seed << 32) + index)
        for index in range(arguments.count)
    ]
    for number, text in enumerate(prompts(llm, params)):
        line = {"kind": "own", "messages": [{"role": "user", "content": text}], "temperature": TEMPERATURES[number % len(TEMPERATURES)]}
        json.dump(line, sys.stdout, ensure_ascii=False)
        print()


def prompts(llm: LLM, params: list[SamplingParams]) -> Iterator[str]:
    """Yield the user's turns that the model writes, each once; turns that do not end are left out."""
    beginning = user_turn(llm)
    seen = set()
    for start in range(0, len(params), llm.max_batch):
        group = params[start : start + llm.max_batch]
        for completion in llm.generate([beginning] * len(group), group):
            text = (completion.text or "").strip()
            if completion.finish_reason == "stop" and text and text not in seen:
                seen.add(text)
                yield text


def user_turn(llm: LLM) -> list[int]:
    """The tokens of the model's chat format up to the user's first words."""
    if llm.chat_format is None:
        raise SystemExit("the model has no chat template, so it cannot write a user's turn; give a model that has one")
    one, other = (llm.chat_format.encode([{"role": "user", "content": word}]) for word in ("one", "two"))
    beginning = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
    if len(beginning) in (0, len(one)):
        raise SystemExit(
            "the model's chat template has nothing before the user's words, so there is no turn to begin; write the prompts yourself"
        )
    return beginning


if __name__ == "__main__":
    main()

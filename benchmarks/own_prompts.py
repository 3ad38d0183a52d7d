"""Prompts that a chat model writes itself, to train a drafter with where there are no others.

    python benchmarks/own_prompts.py smollm2 20000 > prompts.jsonl

A chat model that is given the beginning of a user's turn goes on with what users ask, as its training had it (Magpie, arXiv 2406.08464).
TARGET is a folder made by `l4jax convert`. The same numbers give the same prompts, on the same machine.
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
    """Print the prompts, a JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="the model: a folder made by l4jax convert")
    parser.add_argument("count", type=int, help="how many the model is asked for; those that are cut off or come again are left out")
    parser.add_argument("--temperature", type=float, default=0.9, help="that prompts are drawn at (default: 0.9)")
    parser.add_argument("--max-tokens", type=int, default=80, help="most tokens of a prompt (default: 80)")
    parser.add_argument("--batch", type=int, default=16, help="prompts written together (default: 16)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="hold the model in this (default: as stored)")
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
    """What the model lets a user say, each once; turns that do not end are left out."""
    begun = user_turn(llm)
    seen = set()
    for start in range(0, len(params), llm.max_batch):
        group = params[start : start + llm.max_batch]
        for completion in llm.generate([begun] * len(group), group):
            text = (completion.text or "").strip()
            if completion.finish_reason == "stop" and text and text not in seen:
                seen.add(text)
                yield text


def user_turn(llm: LLM) -> list[int]:
    """The model's chat format up to where the user's first words stand."""
    if llm.chat_format is None:
        raise SystemExit("the model has no chat template, so there is no user's turn to begin; give one that has")
    one, other = (llm.chat_format.encode([{"role": "user", "content": word}]) for word in ("one", "two"))
    begun = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
    if len(begun) in (0, len(one)):
        raise SystemExit("the model's chat template does not begin a user's turn before what the user says; give other prompts")
    return begun


if __name__ == "__main__":
    main()

"""Llama 3.1 8B on one device: decode steps, rounds of speculation and prefill, by the programs that generation runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.h100 import timing
from benchmarks.h100.bench import Bench, Model, Record, random_arrays, rows_at
from l4jax.config import ModelConfig
from l4jax.decoding.generate import BURST
from l4jax.decoding.plan import Speculation


def measure(bench: Bench, record: Record, *, part: str, **arguments: Any) -> None:
    """Measure one of the parts below, and the most memory that it used, if no earlier item of the process has used more."""
    before = bench.peak_bytes
    {"decode": decode, "speculate": speculate, "prefill": prefill}[part](bench, record, **arguments)
    peak = bench.peak_bytes
    if before is not None and peak is not None and peak > before:
        record("memory", {"peak_bytes": peak})


def decode(bench: Bench, record: Record, *, rows: int) -> None:
    """Milliseconds a decode step at each context."""
    model = bench.model
    call = model.abstract.decode_call(rows, _capacity(bench))
    program = bench.compiled(call, record)
    _, abstract, inputs = call.arguments

    def burst(state: Any, context: int) -> tuple[Any, Any, Any]:
        state, tokens = program(model.weights, rows_at(state, context), inputs)
        return state, tokens.steps, tokens.token_sB

    state = random_arrays(abstract)
    for context in bench.sizes.contexts:
        state, times, _ = _timed_bursts(bench, burst, state, context)
        record(f"context {context}", times | {"bytes": decode_bytes(model, rows, context)})


def speculate(bench: Bench, record: Record, *, rows: int, plan: str) -> None:
    """Milliseconds a round at each context. A random head's guesses are hardly ever accepted: a round yields about one token."""
    model, speculation = bench.model, Speculation.parse(plan)
    assert speculation is not None
    call = model.abstract.speculate_call(rows, _capacity(bench), speculation)
    program = bench.compiled(call, record)
    _, abstract, inputs = call.arguments

    def burst(state: Any, context: int) -> tuple[Any, Any, Any]:
        state, tokens, counted = program(model.weights, rows_at(state, context), inputs)
        return state, counted.rounds_B, tokens.token_sB

    state = random_arrays(abstract)
    for context in bench.sizes.contexts:
        state, times, tokens_a_round = _timed_bursts(bench, burst, state, context)
        moved = round_bytes(model, rows, context, speculation)
        record(f"context {context}", times | {"bytes": moved, "tokens_a_round": tokens_a_round})


def _timed_bursts(
    bench: Bench, burst: Callable[[Any, int], tuple[Any, Any, Any]], state: Any, context: int
) -> tuple[Any, dict[str, Any], float]:
    """Times of a turn of the programs' loop (a step or a round), over bursts of BURST turns.

    ``burst`` takes a state, which it donates, and the cached tokens; it returns the next state, the burst's turns (of each row, or
    of all) and its tokens, which are -1 beyond a row's end. Also returns the last state, and the tokens of a row a turn.
    """
    seen = []

    def dispatch() -> Any:
        nonlocal state
        state, *counted = burst(state, context)
        seen.append(counted)
        return counted

    seconds = timing.repeated(dispatch, budget=bench.sizes.seconds)
    # The first burst is not timed.
    counts = [(int(np.max(turns)), np.asarray(token_sB)) for turns, token_sB in seen[1:]]
    short = min(int((token_sB >= 0).sum(axis=0).max()) for _, token_sB in counts)
    if short < BURST:
        raise RuntimeError(f"a dispatch produced {short} tokens a row instead of {BURST}: the logits were not finite")
    produced = sum(int((token_sB >= 0).sum()) / token_sB.shape[1] for _, token_sB in counts)
    a_turn = [dispatched / turns for dispatched, (turns, _) in zip(seconds, counts, strict=True)]
    return state, timing.summary(a_turn), produced / sum(turns for turns, _ in counts)


def prefill(bench: Bench, record: Record, *, piece: int) -> None:
    """Milliseconds for whole prompts, in consecutive pieces of one length, up to the first token."""
    model = bench.model
    capacity = _capacity(bench)
    call = model.abstract.prefill_call(piece, 0, capacity)
    program = bench.compiled(call, record)
    _, abstract, inputs = call.arguments
    resident = rows_at(random_arrays(abstract), 0)
    token_T = np.random.default_rng(0).integers(0, model.config.vocab_size, max(bench.sizes.prompts)).astype(np.int32)
    for prompt in bench.sizes.prompts:

        def dispatch(prompt: int = prompt) -> Any:
            nonlocal resident
            for start in range(0, prompt, piece):
                new = np.full(1, min(piece, prompt - start), np.int32)
                token_BT = np.zeros((1, piece), np.int32)
                token_BT[0, : new[0]] = token_T[start : start + new[0]]
                ends = np.full(1, start + piece >= prompt)
                numbers = {"start_B": start, "prompt_length_B": prompt, "following_B": -1, "slot_B": 0}
                rows = {name: np.full(1, value, np.int32) for name, value in numbers.items()}
                given = dataclasses.replace(inputs, token_BT=token_BT, new_B=new, ends_B=ends, **rows)
                resident, tokens = program(model.weights, resident, given)
            return tokens.token_B

        seconds = timing.repeated(dispatch, budget=bench.sizes.seconds)
        flops = prefill_flops(model.config, prompt, pieces=math.ceil(prompt / piece))
        record(f"prompt {prompt}", timing.summary(seconds) | {"flops": flops, "bytes": math.ceil(prompt / piece) * read_bytes(model)})


def _capacity(bench: Bench) -> int:
    """Tokens that a row's cache has room for: the longest context, and a burst of rounds that accept up to seven drafts each."""
    return max(*bench.sizes.contexts, *bench.sizes.prompts) + 8 * BURST


def read_bytes(model: Model) -> int:
    """Bytes of the weights that a step reads: all but the embedding, of which it reads only one row a token."""
    tied = model.config.tie_word_embeddings
    sizes = dict(zip(model.abstract.programs.model.names, (leaf.size * leaf.dtype.itemsize for leaf in model.weights.target), strict=True))
    return sum(nbytes for name, nbytes in sizes.items() if name != "embed" or tied)


def decode_bytes(model: Model, rows: int, context: int) -> int:
    """Bytes that a decode step must move: the weights once, and every row's keys and values, half a burst of new ones included."""
    config = model.config
    a_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.weights.target[0].dtype.itemsize
    return read_bytes(model) + rows * (context + BURST // 2) * a_token


def round_bytes(model: Model, rows: int, context: int, speculation: Speculation) -> int:
    """Bytes that a round must move: a decode step's, and the drafter once for each level of the tree after the root."""
    # Every level runs the head. Every level but the first runs the layer, and so do the accepted tokens at the end.
    return decode_bytes(model, rows, context) + speculation.tree.depth * sum(
        leaf.size * leaf.dtype.itemsize for leaf in model.weights.drafter
    )


def prefill_flops(config: ModelConfig, tokens: int, pieces: int) -> int:
    """FLOPs of a dense model's matrices and of the scores that are not masked; the output head once a piece."""
    D, h = config.hidden_size, config.head_dim
    layer = D * (2 * config.num_heads + 2 * config.num_kv_heads) * h + 3 * D * config.intermediate_size
    attention = 4 * config.num_heads * h * tokens * (tokens + 1) // 2
    return config.num_layers * (2 * layer * tokens + attention) + pieces * 2 * D * config.vocab_size

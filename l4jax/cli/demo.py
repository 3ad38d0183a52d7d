"""``l4jax demo``: a small real model answers a question."""

from __future__ import annotations

import argparse
import itertools
import resource
import sys
import time
from collections.abc import Iterator

from sharding.words import counted

QUESTION = "What is the capital of France, and why is it famous?"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "demo",
        help="download SmolLM2-135M-Instruct, convert it and ask it a question",
        description="Download SmolLM2-135M-Instruct (once, 93 MB), convert it, and stream its answer to a question.",
    )
    parser.add_argument("-p", "--prompt", default=QUESTION, help="what to ask (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer, in tokens (default: %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Stream the answer, then print its speed with and without speculation."""
    from l4jax import LLM, SamplingParams, load
    from l4jax.cli import STARTED, print_pieces
    from l4jax.smollm2 import ensure_checkpoint

    if not arguments.prompt.strip():
        raise ValueError("the prompt is empty; expected a question")
    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=0.0)
    checkpoint = ensure_checkpoint()
    print(f"> {arguments.prompt}\n", flush=True)
    # On CPUs speculation pays for one prompt in float32; and every token is that of decoding without it, but for near ties.
    llm = load(checkpoint, dtype="float32", max_batch=1)
    messages = [{"role": "user", "content": arguments.prompt}]
    stream = llm.stream_chat(messages, params)
    first_seconds = 0.0

    def timed() -> Iterator[str]:
        nonlocal first_seconds
        for piece in stream:
            first_seconds = first_seconds or time.perf_counter() - STARTED
            yield piece

    print_pieces(timed())
    print(flush=True)
    assert stream.completion is not None
    stats = stream.completion.stats
    plain_llm = LLM(llm.config, llm.weights, tokenizer=llm.tokenizer, chat_format=llm.chat_format, max_batch=1)
    plain = plain_llm.chat(messages, params)
    # Linux counts in KiB, macOS in bytes.
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    same = sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(stream.completion.token_ids, plain.token_ids, strict=False))
    )
    lines = [
        f"{counted(stats.output_tokens, 'token')}, {stats.decode_tokens_per_second:.1f} tokens/s with speculation, acceptance length "
        f"{stats.acceptance_length:.2f}; {plain.stats.decode_tokens_per_second:.1f} tokens/s without, "
        + ("the same tokens" if plain.token_ids == stream.completion.token_ids else _same_at_first(same)),
        f"first text {first_seconds:.1f} s after the command started, {stats.first_token_seconds:.2f} s after the question",
        f"peak memory {peak_bytes / 1e9:.2f} GB",
    ]
    print("\n".join(lines))
    return 0


def _same_at_first(tokens: int) -> str:
    return f"the same first {counted(tokens, 'token')} (then rounding decided between two tokens that were as likely)"

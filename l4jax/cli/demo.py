"""``l4jax demo``: a small real model answers a question."""

from __future__ import annotations

import argparse
import resource
import sys
import time

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
    """Stream the answer, then say how fast it came."""
    from l4jax import SamplingParams, load
    from l4jax.cli import STARTED
    from l4jax.smollm2 import ensure_checkpoint

    if not arguments.prompt.strip():
        raise ValueError("the prompt is empty; expected a question")
    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=0.0)
    checkpoint = ensure_checkpoint()
    print(f"> {arguments.prompt}\n", flush=True)
    llm = load(checkpoint)
    stream = llm.stream_chat([{"role": "user", "content": arguments.prompt}], params)
    first_seconds = None
    for piece in stream:
        first_seconds = first_seconds or time.perf_counter() - STARTED
        print(piece, end="", flush=True)
    print("\n")
    assert stream.completion is not None
    stats = stream.completion.stats
    # Linux counts in KiB, macOS in bytes.
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    lines = [
        f"{stats.output_tokens} tokens, {stats.decode_tokens_per_second:.1f} tokens/s",
        f"first text {first_seconds or 0.0:.1f} s after the command started, {stats.first_token_seconds:.2f} s after the question was put",
        f"peak memory {peak_bytes / 1e9:.2f} GB",
    ]
    print("\n".join(lines))
    return 0

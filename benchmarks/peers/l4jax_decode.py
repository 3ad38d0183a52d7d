"""A worker (see ``worker.py``) that times l4jax on the CPU, through the same batches that ``LLM.generate`` runs."""

from __future__ import annotations

import importlib.metadata
import os
import time

import jax
from l4jax.batch import Batch
from worker import Ready, Repetition, Work, argument_parser, serve

import l4jax
from l4jax.decoding.generate import BURST
from l4jax.request import Request


def main() -> None:
    """Load the model and serve repetitions."""
    parser = argument_parser(__doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights, activations and cache")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    llm = l4jax.load(arguments.model, dtype=arguments.dtype, speculation="off", max_batch=arguments.batch)

    def repeat(work: Work) -> Repetition:
        params = l4jax.SamplingParams(max_tokens=work.new_tokens + 1, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        batch = Batch(llm.runner, [Request(tokens, params, 0, ()) for tokens in work.prompts])
        rows = [new.token_ids for new in batch.step(1)]
        prefilled = time.perf_counter()
        while not all(batch.done):
            for row, new in zip(rows, batch.step(BURST), strict=True):
                row += new.token_ids
        return Repetition(prefilled - start, time.perf_counter() - prefilled, rows)

    library = f"l4jax {importlib.metadata.version('l4jax')}, jax {jax.__version__}"
    serve(Ready(library, arguments.dtype, arguments.dtype, llm.weight_bytes), repeat)


if __name__ == "__main__":
    main()

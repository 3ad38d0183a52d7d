"""A worker (see ``worker.py``) that times l4jax on the CPU, by the engine that ``LLM.generate`` runs."""

from __future__ import annotations

import importlib.metadata
import os
import time

import jax
from worker import Ready, Repetition, Work, argument_parser, serve

import l4jax


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
        handles = [llm.add(tokens, params) for tokens in work.prompts]
        while not all(handle.tokens for handle in handles):
            llm.step()
        prefilled = time.perf_counter()
        while llm.step():
            pass
        return Repetition(prefilled - start, time.perf_counter() - prefilled, [handle.tokens for handle in handles])

    library = f"l4jax {importlib.metadata.version('l4jax')}, jax {jax.__version__}"
    serve(Ready(library, arguments.dtype, arguments.dtype, llm.weight_bytes), repeat)


if __name__ == "__main__":
    main()

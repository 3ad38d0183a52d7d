"""The sampler alone, compiled for the machine's default device: milliseconds a step.

    python benchmarks/sampling.py [--vocab 49152 202048] [--batch 1 8] [--repetitions 200]

Logits are normal with a standard deviation of 3. Each line has the median and the lowest time of one call: of greedy rows, of rows at
temperature 1 with nothing cut, and of rows with top-k 50 and top-p 0.9. A call's dispatch (some 0.05 ms) counts; a decode step, which runs
the sampler inside its loop, does not pay it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from l4jax.decoding.params import SamplingParams
from l4jax.decoding.sampling import SamplingRows, TokenCounts, sample, sampling_settings

SETTINGS = {"greedy": {"temperature": 0.0}, "nothing cut": {}, "top-k, top-p": {"top_k": 50, "top_p": 0.9}}


def seconds(params: SamplingParams, batch: int, vocab: int, repetitions: int) -> list[float]:
    """How long each of the calls takes, after two to warm up."""
    every = [params] * batch
    settings = sampling_settings(every, range(batch), [[]] * batch, vocab)
    rows = jax.device_put(SamplingRows(**vars(settings), slot_B=jnp.arange(batch, dtype=jnp.int32)))
    counts = TokenCounts(jnp.zeros((batch, vocab), bool), jnp.zeros((batch, vocab), jnp.int32))
    logits_BV = jnp.asarray(3 * np.random.default_rng(0).normal(size=(batch, vocab)), jnp.float32)
    step = jax.jit(sample)
    taken = []
    for position in range(repetitions + 2):
        position_B = jnp.full(batch, position, jnp.int32)
        start = time.perf_counter()
        step(logits_BV, rows, counts, position_B).block_until_ready()
        taken.append(time.perf_counter() - start)
    return taken[2:]


def main() -> None:
    """Parse the command line and print a line for each vocabulary, batch and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 202048])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repetitions", type=int, default=200)
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; ms a call, median (lowest)")
    for vocab in arguments.vocab:
        for batch in arguments.batch:
            for name, settings in SETTINGS.items():
                taken = seconds(SamplingParams(**settings), batch, vocab, arguments.repetitions)
                print(f"vocabulary {vocab:6}, batch {batch:2}, {name:12} {1e3 * statistics.median(taken):8.3f} ({1e3 * min(taken):.3f})")


if __name__ == "__main__":
    main()

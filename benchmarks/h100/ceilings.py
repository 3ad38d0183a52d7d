"""The device's ceilings: a copy within its memory, and a matrix product in bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.h100 import timing
from benchmarks.h100.bench import Bench, Record


def measure(bench: Bench, record: Record) -> None:
    """Bytes a second of a copy (read and written both counted) and of reading; FLOP/s of a square product of random matrices."""
    size, n = bench.sizes.copy_bytes // 4, bench.sizes.matmul
    with jax.default_device(bench.device):
        x = jax.random.normal(jax.random.key(0), (size // 1024, 1024), jnp.float32)
        a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.float32).astype(jnp.bfloat16) for i in (1, 2))
    copy, read = jax.jit(lambda x: x + 1.0), jax.jit(jnp.sum)
    # No other measurement of this item needs as much memory: the array, and the results of all dispatches that are enqueued at once.
    for name, dispatch, moved in (("copy", lambda: copy(x), 2 * x.nbytes), ("read", lambda: read(x), x.nbytes)):
        seconds = timing.queued(dispatch, 5, budget=bench.sizes.seconds)
        record(name, timing.summary(seconds) | {"bytes_per_second": moved / min(seconds)})
    product = jax.jit(lambda a, b: a @ b)
    seconds = timing.queued(lambda: product(a, b), 10, budget=bench.sizes.seconds)
    record("matmul", timing.summary(seconds) | {"flops_per_second": 2 * n**3 / min(seconds)})

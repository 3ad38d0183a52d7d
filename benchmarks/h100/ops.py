"""Each op of ``pallas_kernels`` at real shapes, beside XLA's own lowering.

A program calls the op many times, over sets of arrays that together exceed the L2 cache. Each call waits for the result of the call
before, so that neither the host's work nor the cache affects the times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.h100 import timing
from benchmarks.h100.bench import Bench, Record
from benchmarks.h100.shapes import SHAPES, Attention, Grouped
from pallas_kernels.flash_attention import attend, attend_pages
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.tree_attention import tree_attention

PAGE = 128
_LEAST_SECONDS, _BYTES_PER_SECOND, _FLOPS_PER_SECOND = 4e-6, 3e12, 8e14  # a lower bound on the time of a call on an H100


def measure(bench: Bench, record: Record, *, op: str) -> None:
    """Record the milliseconds that a call of the op, and of each rival in JAX, takes at every shape."""
    for shape in SHAPES[bench.sizes.name][op]:
        arrays, implementations, flops = CASES[op](shape)
        for name, function in implementations.items():
            values = timed(bench, function, arrays, shape.nbytes, flops)
            record(f"{shape.label} | {name}", values | {"bytes": shape.nbytes, "flops": flops})


Case = tuple[Callable[[Array], tuple[Array, ...]], Mapping[str, Callable[..., Any]], int]
"""A function that makes the arrays from a key, the functions that are called with them by name, and the FLOPs of a call."""


def _pages(shape: Attention) -> Case:
    B, T, W, G = shape.B, shape.T, shape.S // PAGE, shape.G
    pages_BW = jnp.arange(B * W, dtype=jnp.int32).reshape(B, W)
    start_BT, end_BT = jnp.zeros((B, T), jnp.int32), jnp.full((B, T), shape.S, jnp.int32)
    scale = shape.h**-0.5

    def arrays(key: Array) -> tuple[Array, ...]:
        pool = (B * W, shape.K, PAGE, shape.h)
        return _normal(key, (B, T, shape.K, G, shape.h), pool, pool)

    def own(q_BTKGh: Array, k_PKph: Array, v_PKph: Array) -> Array:
        return attend_pages(q_BTKGh, k_PKph, v_PKph, pages_BW, start_BT, end_BT, scale=scale)[0]

    def gathered(q_BTKGh: Array, k_PKph: Array, v_PKph: Array) -> Array:
        k_BSKh, v_BSKh = (jnp.swapaxes(pool[pages_BW], 2, 3).reshape(B, shape.S, shape.K, shape.h) for pool in (k_PKph, v_PKph))
        return jax.nn.dot_product_attention(q_BTKGh.reshape(B, T, -1, shape.h), k_BSKh, v_BSKh, scale=scale)

    return arrays, {"own": own, "XLA: pages gathered, then dot_product_attention": gathered}, shape.flops(T * shape.S)


def _tree(shape: Attention) -> Case:
    B, N, W, G = shape.B, shape.T, shape.S // PAGE, shape.G
    pages_BW = jnp.arange(B * W, dtype=jnp.int32).reshape(B, W)
    start_BN, end_BN = jnp.zeros((B, N), jnp.int32), jnp.full((B, N), shape.S, jnp.int32)
    sees_BNS = jnp.broadcast_to(jnp.tril(jnp.ones((N, N), bool))[None], (B, N, N))

    def arrays(key: Array) -> tuple[Array, ...]:
        pool, nodes = (B * W, shape.K, PAGE, shape.h), (B, N, shape.K, shape.h)
        return _normal(key, (B, N, shape.K, G, shape.h), nodes, nodes, pool, pool)

    def own(q_BNKGh: Array, k_BSKh: Array, v_BSKh: Array, k_PKph: Array, v_PKph: Array) -> Array:
        prefix = (k_PKph, v_PKph, pages_BW, start_BN, end_BN)
        return tree_attention(q_BNKGh, k_BSKh, v_BSKh, sees_BNS, *prefix, scale=shape.h**-0.5)[0]

    return arrays, {"own": own}, shape.flops(N * shape.S + N * N)


def _attend(shape: Attention) -> Case:
    B, T = shape.B, shape.T
    start_BT = jnp.zeros((B, T), jnp.int32)
    end_BT = jnp.broadcast_to(jnp.arange(1, T + 1, dtype=jnp.int32)[None], (B, T))
    scale = shape.h**-0.5

    def arrays(key: Array) -> tuple[Array, ...]:
        keys = (B, shape.S, shape.K, shape.h)
        return _normal(key, (B, T, shape.K, shape.G, shape.h), keys, keys)

    def own(q_BTKGh: Array, k_BSKh: Array, v_BSKh: Array) -> Array:
        return attend(q_BTKGh, k_BSKh, v_BSKh, start_BT, end_BT, scale=scale)[0]

    def jax_nn(implementation: str) -> Callable[..., Array]:
        def call(q_BTKGh: Array, k_BSKh: Array, v_BSKh: Array) -> Array:
            q_BTHh = q_BTKGh.reshape(B, T, -1, shape.h)
            options: Any = {"implementation": implementation, "is_causal": True, "scale": scale}
            return jax.nn.dot_product_attention(q_BTHh, k_BSKh, v_BSKh, **options)

        return call

    implementations = {"own": own, "XLA: dot_product_attention": jax_nn("xla"), "cuDNN: dot_product_attention": jax_nn("cudnn")}
    return arrays, implementations, shape.flops(T * (T + 1) // 2)


def _grouped(shape: Grouped) -> Case:
    sizes_E = jnp.asarray(shape.sizes, jnp.int32)

    def arrays(key: Array) -> tuple[Array, ...]:
        return _normal(key, (shape.M, shape.D), (shape.E, shape.D, shape.F))

    def own(x_MD: Array, w_EDF: Array) -> Array:
        return grouped_matmul(x_MD, w_EDF, sizes_E)

    def ragged(x_MD: Array, w_EDF: Array) -> Array:
        return jax.lax.ragged_dot(x_MD, w_EDF, sizes_E)

    return arrays, {"own": own, "XLA: ragged_dot": ragged}, shape.flops


CASES: Mapping[str, Callable[[Any], Case]] = {
    "attend_pages": _pages,
    "tree_attention": _tree,
    "attend": _attend,
    "grouped_matmul": _grouped,
}


def timed(bench: Bench, function: Callable[..., Any], arrays: Callable[[Array], Any], nbytes: int, flops: int) -> dict[str, Any]:
    """The milliseconds of a call and the seconds of compilation. If the function does not compile here: one line that says why."""
    copies = max(1, min(8, -(-bench.sizes.rotated_bytes // nbytes)))
    least = max(_LEAST_SECONDS, nbytes / _BYTES_PER_SECOND, flops / _FLOPS_PER_SECOND)
    loops = max(1, min(bench.sizes.most_loops, int(0.01 / (least * copies))))

    def program(sets: list[tuple[Array, ...]]) -> Any:
        def again(_: Array, last: Any) -> Any:
            for first, *rest in sets:
                # Each call waits for the call before, so XLA cannot move it out of the loop or run both at once.
                first, _ = jax.lax.optimization_barrier((first, last))
                last = function(first, *rest)
            return last

        last = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *sets[0]))
        return jax.lax.fori_loop(0, loops, again, last)

    with jax.default_device(bench.device):
        sets = [jax.jit(arrays)(jax.random.key(copy)) for copy in range(copies)]
        started = time.perf_counter()
        try:
            compiled = jax.jit(program).lower(sets).compile()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            return {"why": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        compile_seconds = time.perf_counter() - started
        seconds = timing.repeated(lambda: compiled(sets), budget=bench.sizes.seconds / 3)
    return timing.summary(seconds, per=copies * loops) | {"compile_seconds": compile_seconds}


def _normal(key: Array, *shapes: tuple[int, ...]) -> tuple[Array, ...]:
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(k, shape, jnp.float32).astype(jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True))

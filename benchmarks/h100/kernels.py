"""Compares attention's kernels with XLA's lowering in float32, both on the device, at real shapes and with ragged intervals.

The simulator of a GPU that the tests use computes matrix products at once; only a GPU shows whether a kernel waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.h100.bench import Bench, Record
from benchmarks.h100.ops import PAGE, on_device
from benchmarks.h100.shapes import SHAPES
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.keys import Interval, NewKeys, PagedKeys, TreeKeys
from pallas_kernels.shapes import Attention
from pallas_kernels.tree_attention import tree_attention

OPS: dict[str, Callable[..., Any]] = {"tree_attention": tree_attention, "flash_attention": flash_attention}
OUTPUT_TOLERANCE, LSE_TOLERANCE = 2e-2, 1e-3
"""Most that outputs differ by, as a part of the largest one (weights are rounded to bfloat16), and that log-sum-exps differ by."""


def measure(bench: Bench, record: Record, *, op: str) -> None:
    """Record for each shape how far the results differ, and whether a second call gives the same bits.

    Raises RuntimeError if any differ by more than rounding.
    """
    wrong = []
    for shape in SHAPES[bench.sizes.name][op]:
        given = problem(op, shape)

        def call(implementation: str | None, dtype: Any, given: Any = given, shape: Attention = shape) -> tuple[Array, Array]:
            def whole(*arguments: Any) -> Any:
                return OPS[op](*arguments, scale=shape.h**-0.5, implementation=implementation)

            arguments = jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, given)
            return jax.jit(on_device(whole, bench.device))(*jax.device_put(arguments, bench.device))

        with jax.default_matmul_precision("highest"):
            expected_out, expected_lse = (np.asarray(a) for a in call("xla", jnp.float32))
        (out, lse), again = (tuple(np.asarray(a) for a in call(None, jnp.bfloat16)) for _ in range(2))
        nothing = np.isneginf(expected_lse)
        values = {
            "output_difference": float(np.abs(out - expected_out).max() / np.abs(expected_out).max()),
            "lse_difference": float(np.abs(np.where(nothing, 0, lse) - np.where(nothing, 0, expected_lse)).max()),
            "same_bits_twice": bool((out == again[0]).all() and (lse == again[1]).all()),
        }
        agree = values["output_difference"] <= OUTPUT_TOLERANCE and values["lse_difference"] <= LSE_TOLERANCE and values["same_bits_twice"]
        agree = agree and bool((np.isneginf(lse) == nothing).all())
        record(shape.label, values | {"agree": agree})
        if not agree:
            wrong.append(shape.label)
    if wrong:
        raise RuntimeError(f"{op} is wrong at: {', '.join(wrong)}")


def problem(op: str, shape: Attention) -> tuple[Any, ...]:
    """Random arguments, on the host. In some rows, and for some queries, nothing is cached; ends are anywhere in a page."""
    rng = np.random.default_rng(0)
    B, T, K, G, h = shape.B, shape.T, shape.K, shape.G, shape.h
    cached = shape.S if op == "tree_attention" else shape.S - T
    W = -(-cached // PAGE)

    def normal(*sizes: int) -> Any:
        return rng.standard_normal(sizes, np.float32).astype(jnp.bfloat16)

    end_B = np.where(np.arange(B) % 5 == 1, 0, rng.integers(cached // 2, cached + 1, B))
    start_BT = np.broadcast_to((rng.integers(0, cached // 3 + 1, B) * (np.arange(B) % 3 == 2))[:, None], (B, T))
    end_BT = np.where(np.arange(T)[None] % 11 == 7, 0, end_B[:, None])
    interval = Interval(start_BT.astype(np.int32), end_BT.astype(np.int32))
    pages_BW = rng.permutation(B * W).reshape(B, W).astype(np.int32)
    prefix = PagedKeys(normal(B * W, K, PAGE, h), normal(B * W, K, PAGE, h), pages_BW, interval) if cached else None
    q, k, v = normal(B, T, K, G, h), normal(B, T, K, h), normal(B, T, K, h)
    if op == "tree_attention":
        sees_BNS = (rng.random((B, T, T)) < 0.4) | np.eye(T, dtype=bool)[None]
        return q, TreeKeys(k, v, sees_BNS), prefix
    token_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    causal = Interval(np.maximum(token_BT - 3000, 0), np.where(token_BT % 13 == 5, 0, token_BT + 1).astype(np.int32))
    return q, NewKeys(k, v, causal), prefix

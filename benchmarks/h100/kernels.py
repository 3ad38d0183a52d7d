"""Compares our kernels with XLA's lowering in float32, both on the device, at real shapes and with ragged inputs.

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
from pallas_kernels.experts import Experts, experts
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.heads import Heads, Pools, Targets, write_heads
from pallas_kernels.keys import Interval, NewKeys, PagedKeys, TreeKeys
from pallas_kernels.merge import merge_splits
from pallas_kernels.norm import add_norm
from pallas_kernels.shapes import Attention, Mixture, NewHeads, Residual, Splits
from pallas_kernels.tree_attention import tree_attention

OUTPUT_TOLERANCE, LSE_TOLERANCE = 2e-2, 1e-3
"""Most that outputs differ by, as a part of the largest one (weights are rounded to bfloat16), and that log-sum-exps differ by."""


def measure(bench: Bench, record: Record, *, op: str) -> None:
    """Record for each shape how far the results differ, and whether a second call gives the same bits.

    Raises RuntimeError if any differ by more than rounding.
    """
    wrong = []
    for shape in SHAPES[bench.sizes.name][op]:
        given = problem(op, shape)

        def call(implementation: str | None, dtype: Any, given: Any = given, shape: Any = shape) -> list[np.ndarray]:
            def whole(*arguments: Any) -> Any:
                return OPS[op](shape, implementation, *arguments)

            arguments = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.bfloat16 else leaf, given)
            results = jax.jit(on_device(whole, bench.device))(*jax.device_put(arguments, bench.device))
            return [np.asarray(result, np.float32) for result in results]

        with jax.default_matmul_precision("highest"):
            expected = call("xla", jnp.float32)
        results, again = call(None, jnp.bfloat16), call(None, jnp.bfloat16)
        values = {
            "output_difference": float(np.abs(results[0] - expected[0]).max() / np.abs(expected[0]).max()),
            "same_bits_twice": all((a == b).all() for a, b in zip(results, again, strict=True)),
        }
        agree = values["output_difference"] <= OUTPUT_TOLERANCE and values["same_bits_twice"]
        if len(expected) == 2:  # a log-sum-exp, which is -inf where a query saw nothing
            lse, expected_lse = results[1], expected[1]
            nothing = np.isneginf(expected_lse)
            values["lse_difference"] = float(np.abs(np.where(nothing, 0, lse) - np.where(nothing, 0, expected_lse)).max())
            agree = agree and values["lse_difference"] <= LSE_TOLERANCE and bool((np.isneginf(lse) == nothing).all())
        record(shape.label, values | {"agree": agree})
        if not agree:
            wrong.append(shape.label)
    if wrong:
        raise RuntimeError(f"{op} is wrong at: {', '.join(wrong)}")


def _tree(shape: Attention, implementation: str | None, *arguments: Any) -> tuple[Array, ...]:
    return tree_attention(*arguments, scale=shape.h**-0.5, implementation=implementation)


def _flash(shape: Attention, implementation: str | None, *arguments: Any) -> tuple[Array, ...]:
    return flash_attention(*arguments, scale=shape.h**-0.5, implementation=implementation)


def _merge_splits(shape: Splits, implementation: str | None, *arguments: Any) -> tuple[Array, ...]:
    return merge_splits(*arguments, shape.T, shape.G, jnp.float32, implementation=implementation)


def _experts(shape: Mixture, implementation: str | None, *arguments: Any) -> tuple[Array, ...]:
    return (experts(*arguments, implementation=implementation),)


def _write_heads(shape: NewHeads, implementation: str | None, *arguments: Any) -> tuple[Array, ...]:
    q_BTKGh, pools = write_heads(*arguments, implementation=implementation)
    return (jnp.concatenate([array.reshape(-1) for array in (q_BTKGh, pools.k_PKph, pools.v_PKph)]),)


def _add_norm(shape: Residual, implementation: str | None, *arguments: Any) -> tuple[Array, ...]:
    return (jnp.concatenate(add_norm(*arguments, eps=1e-5, implementation=implementation)),)


OPS: dict[str, Callable[..., tuple[Array, ...]]] = {
    "tree_attention": _tree,
    "merge_splits": _merge_splits,
    "flash_attention": _flash,
    "experts": _experts,
    "write_heads": _write_heads,
    "add_norm": _add_norm,
}


def problem(op: str, shape: Any) -> tuple[Any, ...]:
    """Random arguments."""
    match shape:
        case Mixture():
            return _mixture(shape)
        case Splits():
            return _splits(shape)
        case NewHeads():
            return _written(shape)
        case Residual(M=M, D=D):
            rng = np.random.default_rng(0)
            return _normal(rng, M, D), _normal(rng, M, D), _normal(rng, D)
    return _attention(op, shape)


def _splits(shape: Splits) -> tuple[Any, ...]:
    """Some splits, and with several nodes all splits of one query row, saw no key."""
    rng = np.random.default_rng(0)
    size = shape.B, shape.K, shape.splits, -(-shape.T * shape.G // 8) * 8
    empty = rng.random(size) < 0.3
    empty[..., -1] = shape.T > 1
    lse = np.where(empty, -np.inf, rng.normal(scale=10, size=size)).astype(np.float32)
    return rng.normal(size=(*size, shape.h)).astype(np.float32) * ~empty[..., None], lse


def _written(shape: NewHeads) -> tuple[Any, ...]:
    """Heads that are rotated, normalised and scaled. With two rows or more, one row's key and value are dropped."""
    rng = np.random.default_rng(0)
    B, K, h = shape.B, shape.K, shape.h
    angle_BTr = rng.uniform(-9, 9, (B, 1, h // 2)).astype(np.float32)
    heads = Heads(_normal(rng, B, 1, K, shape.G + 2, h), (np.cos(angle_BTr), np.sin(angle_BTr)), rng.random((B, 1), np.float32), 1e-5)
    page_BT = rng.permutation(B).astype(np.int32)[:, None]
    page_BT[B // 2] = B if B > 1 else 0
    return heads, Pools(_normal(rng, B, K, PAGE, h), _normal(rng, B, K, PAGE, h)), Targets(page_BT, page_BT * 7 % PAGE)


def _normal(rng: np.random.Generator, *sizes: int) -> Array:
    """Drawn by JAX: numpy takes seconds for the matrices of many experts."""
    return jax.random.normal(jax.random.key(rng.integers(2**31)), sizes, jnp.bfloat16)


def _mixture(shape: Mixture) -> tuple[Any, ...]:
    """Half of the rows chose one expert, some none; there is a shared expert."""
    rng = np.random.default_rng(0)
    M, E, D, F = shape.M, shape.E, shape.D, shape.F
    expert_M = np.where(rng.random(M) < 0.5, E // 2, rng.integers(-1, E + 1, M)).astype(np.int32)
    routed, shared = (Experts(_normal(rng, count, 2, F, D), _normal(rng, count, D, F)) for count in (E, 1))
    return _normal(rng, M, D), rng.random(M, np.float32), expert_M, routed, shared


def _attention(op: str, shape: Attention) -> tuple[Any, ...]:
    """In some rows, and for some queries, nothing is cached; ends are anywhere in a page."""
    rng = np.random.default_rng(0)
    B, T, K, G, h = shape.B, shape.T, shape.K, shape.G, shape.h
    cached = shape.S if op == "tree_attention" else shape.S - T
    W = -(-cached // PAGE)
    end_B = np.where(np.arange(B) % 5 == 1, 0, rng.integers(cached // 2, cached + 1, B))
    start_BT = np.broadcast_to((rng.integers(0, cached // 3 + 1, B) * (np.arange(B) % 3 == 2))[:, None], (B, T))
    end_BT = np.where(np.arange(T)[None] % 11 == 7, 0, end_B[:, None])
    interval = Interval(start_BT.astype(np.int32), end_BT.astype(np.int32))
    pages_BW = rng.permutation(B * W).reshape(B, W).astype(np.int32)
    pool = B * W, K, PAGE, h
    prefix = PagedKeys(_normal(rng, *pool), _normal(rng, *pool), pages_BW, interval) if cached else None
    q, k, v = _normal(rng, B, T, K, G, h), _normal(rng, B, T, K, h), _normal(rng, B, T, K, h)
    if op == "tree_attention" and T == 1:
        return q, None, prefix
    if op == "tree_attention":
        sees_BNS = (rng.random((B, T, T)) < 0.4) | np.eye(T, dtype=bool)[None]
        return q, TreeKeys(k, v, sees_BNS), prefix
    token_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    causal = Interval(np.maximum(token_BT - 3000, 0), np.where(token_BT % 13 == 5, 0, token_BT + 1).astype(np.int32))
    return q, NewKeys(k, v, causal), prefix

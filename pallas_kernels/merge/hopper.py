"""Merging the splits of tree attention on Hopper GPUs: one kernel, where XLA makes two or more."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32

from pallas_kernels.implementations import require_hopper
from pallas_kernels.mosaic import LOG2_E, MASKED, kernel, plgpu

HEAD_DIM = 128
"""The only one that is supported: each of a warpgroup's 128 threads has one number of the output."""
MOST_SPLITS = 256
"""A copy takes no more along a dimension."""
_TOGETHER = 8
"""Splits that are added in one iteration of the loop."""
_LSE_ROWS = 8
"""Query rows whose log-sum-exps are copied together: a copy takes at least 16 bytes, and rows are padded to a multiple of 8."""


def merge_splits(
    out_BKzMh: Float32[Array, "B K z M h"], lse_BKzM: Float32[Array, "B K z M"], N: int, G: int, dtype: Any
) -> Float[Array, "B N K G h"]:
    """One thread block for each query row. Raises NotImplementedError for what the kernel does not take."""
    require_hopper()
    B, K, z, M, h = out_BKzMh.shape
    if M % _LSE_ROWS:
        raise NotImplementedError(f"takes rows padded to a multiple of {_LSE_ROWS}; there are {M}")
    if h != HEAD_DIM:
        raise NotImplementedError(f"takes head dimension {HEAD_DIM}; this one is {h}")
    if z > MOST_SPLITS:
        raise NotImplementedError(f"takes up to {MOST_SPLITS} splits; there are {z}")
    return _kernel(B, K, z, N, G, h, dtype)(out_BKzMh, lse_BKzM)


def shared_bytes(splits: int, h: int) -> int:
    """Shared memory of a thread block, without barriers: all that it copies."""
    return splits * (h + _LSE_ROWS) * 4


def _kernel(B: int, K: int, splits: int, N: int, G: int, h: int, dtype: Any) -> Any:
    """The kernel: (each split's output, and its log-sum-exp) to the merged output."""

    def body(out_ref: Any, lse_ref: Any, merged_ref: Any, out_s: Any, lse_s: Any, loaded: Any) -> None:
        b, head, query = (jax.lax.axis_index(name) for name in ("row", "head", "query"))
        place = jax.lax.rem(query, _LSE_ROWS)
        plgpu.copy_gmem_to_smem(out_ref.at[b, head, :, query], out_s, loaded)
        plgpu.copy_gmem_to_smem(lse_ref.at[b, head, :, pl.ds(query - place, _LSE_ROWS)], lse_s, loaded)
        plgpu.barrier_wait(loaded)

        def add(before: tuple[Array, Array, Array], first: Any, count: int) -> tuple[Array, Array, Array]:
            """The online softmax (arXiv 2205.14135, algorithm 1), in base 2, over splits instead of keys."""
            out, highest, total = before
            # A split without keys has -inf, and zeros as output.
            scores = [jnp.maximum(lse_s[first + i, place] * LOG2_E, MASKED) for i in range(count)]
            new_highest = functools.reduce(jnp.maximum, scores, highest)
            rescale = jnp.exp2(highest - new_highest)
            out, total = out * rescale, total * rescale
            for i, score in enumerate(scores):
                weight = jnp.exp2(score - new_highest)
                out, total = out + plgpu.load(out_s.at[first + i]) * weight, total + weight
            return out, new_highest, total

        nothing = jnp.zeros((h,), jnp.float32), jnp.float32(MASKED), jnp.float32(0.0)
        turns, rest = divmod(splits, _TOGETHER)
        merged = jax.lax.fori_loop(0, turns, lambda turn, before: add(before, turn * _TOGETHER, _TOGETHER), nothing)
        out, _, total = add(merged, turns * _TOGETHER, rest)
        merged_ref[b, query // G, head, jax.lax.rem(query, G)] = (out * (1.0 / total)).astype(dtype)

    return kernel(
        "merge_splits",
        body,
        out_type=jax.ShapeDtypeStruct((B, N, K, G, h), dtype),
        grid=(B, K, N * G),
        grid_names=("row", "head", "query"),
        scratch_types=[
            plgpu.SMEM((splits, h), jnp.float32),
            plgpu.SMEM((splits, _LSE_ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        ],
    )

"""Grouped matmul on GPUs for a few rows, until a kernel of its own replaces it: every group's matrix times all rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.implementations import require_gpu

_MOST_ROWS = 64
"""With more rows the products that are thrown away cost more than the loop over groups."""

_GROUPS_A_ROW = 4
"""With more groups a row, reading all matrices takes longer than starting the loop's kernels for those that rows need."""


def grouped_matmul(lhs_Mi: Float[Array, "M i"], rhs_Eio: Float[Array, "E i o"], group_sizes_E: Int32[Array, "E"]) -> Float[Array, "M o"]:
    """One batched product instead of a loop.

    On an H100 a turn of the loop takes 81 µs for a matrix that is read in 14 µs, and 16 matrices at once take 123 µs
    (``benchmarks/results/h100-sxm-jax-0.11.2.json``, "Scout gate and up on tensor=8, 8 rows").
    """
    require_gpu()
    M, E = len(lhs_Mi), len(rhs_Eio)
    if M > _MOST_ROWS or _GROUPS_A_ROW * M < E:
        raise NotImplementedError(f"{M} rows and {E} groups: the loop over groups is faster")
    return all_products(lhs_Mi, rhs_Eio, group_sizes_E)


def all_products(lhs_Mi: Float[Array, "M i"], rhs_Eio: Float[Array, "E i o"], group_sizes_E: Int32[Array, "E"]) -> Float[Array, "M o"]:
    """Every row times every matrix. Each row's own product is selected, not summed with zeros, so other matrices' NaNs stay out."""
    M, E = len(lhs_Mi), len(rhs_Eio)
    group_M = jnp.sum(jnp.cumsum(group_sizes_E)[None, :] <= jnp.arange(M, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32)
    # A batch of products, one for each matrix: as a single product of all columns XLA would transpose the matrices first.
    lhs_EMi = jax.lax.optimization_barrier(jnp.broadcast_to(lhs_Mi[None], (E, *lhs_Mi.shape)))
    product_EMo = jnp.einsum("emi,eio->emo", lhs_EMi, rhs_Eio, preferred_element_type=jnp.float32)
    product_1Mo = jnp.take_along_axis(product_EMo, group_M[None, :, None], axis=0, mode="fill", fill_value=0)
    return product_1Mo[0].astype(lhs_Mi.dtype)

"""Grouped matmul in plain JAX: a loop over blocks of rows that belong to one group.

``jax.lax.ragged_dot`` is lowered densely on CPUs and NVIDIA GPUs (every group's matrix times every row), so it is not
used. Here the work is that of the chosen groups, each group's rows rounded up to whole blocks and its matrix fetched once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

# Rows per block: enough to keep a matrix unit busy, few enough that rounding a group up wastes little.
_MAX_BLOCK_ROWS = 128


def grouped_matmul(lhs_MK: Float[Array, "M K"], rhs_GKN: Float[Array, "G K N"], group_sizes_G: Int32[Array, "G"]) -> Float[Array, "M N"]:
    """Row ``m`` of group ``g`` times ``rhs[g]``.

    Rows are sorted by group: the first ``group_sizes[0]`` rows belong to group 0, and so on; those behind the last group's
    cost nothing and give zeros. Any imbalance is exact, one group holding every row included. Groups with no rows cost nothing.
    Accumulates in float32 and returns ``lhs``'s dtype.
    """
    rows, groups = lhs_MK.shape[0], rhs_GKN.shape[0]
    block = min(rows, _MAX_BLOCK_ROWS, max(8, _next_power_of_two(rows // groups)))
    ends_G = jnp.cumsum(group_sizes_G)
    starts_G = ends_G - group_sizes_G
    filled = group_sizes_G > 0
    order_G = jnp.argsort(~filled, stable=True)

    def multiply_group(index: Array, out_MN: Array) -> Array:
        group = order_G[index]
        # Fetched once, however many blocks it meets: XLA copies it.
        rhs_KN = rhs_GKN[group]

        def multiply_block(index: Array, out_MN: Array) -> Array:
            row = starts_G[group] + index * block
            lhs_bK = jax.lax.dynamic_slice_in_dim(padded_MK, row, block)
            product_bN = jnp.einsum("bk,kn->bn", lhs_bK, rhs_KN, preferred_element_type=jnp.float32)
            # A block may run past its group's last row: what it writes there is replaced when the next group's turn comes.
            return jax.lax.dynamic_update_slice_in_dim(out_MN, product_bN.astype(lhs_MK.dtype), row, 0)

        return jax.lax.fori_loop(0, (group_sizes_G[group] + block - 1) // block, multiply_block, out_MN)

    padded_MK = jnp.pad(lhs_MK, ((0, block), (0, 0)))
    out_MN = jnp.zeros((rows + block, rhs_GKN.shape[2]), lhs_MK.dtype)
    out_MN = jax.lax.fori_loop(0, jnp.sum(filled, dtype=jnp.int32), multiply_group, out_MN)[:rows]
    # The last group's last block may have run past it.
    return jnp.where(jnp.arange(rows, dtype=jnp.int32)[:, None] < ends_G[-1], out_MN, jnp.zeros((), out_MN.dtype))


def _next_power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()

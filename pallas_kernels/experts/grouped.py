"""Products of consecutive groups of rows, each with its own matrix, in plain JAX: a loop over blocks of rows that belong to one group.

``jax.lax.ragged_dot`` is lowered densely on CPUs and NVIDIA GPUs (every group's matrix times every row), so it is not
used. Here the work is that of the chosen groups, each group's rows rounded up to whole blocks and its matrix fetched once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

# Rows per block: enough to keep a matrix unit busy, few enough that rounding a group up wastes little.
_MAX_BLOCK_ROWS = 128


def grouped_matmul(lhs_Mi: Float[Array, "M i"], rhs_Eoi: Float[Array, "E o i"], group_sizes_E: Int32[Array, "E"]) -> Float[Array, "M o"]:
    """Row ``m`` of group ``g`` times ``rhs[g].T``; accumulates in float32 and returns ``lhs``'s dtype.

    Rows are sorted by group: the first ``group_sizes[0]`` rows belong to group 0, and so on; those after the last group's give zeros.
    There is a loop over groups, and in it one over the blocks of a group's rows. Groups and rows of no group cost nothing.
    """
    rows, groups = lhs_Mi.shape[0], rhs_Eoi.shape[0]
    block = min(rows, _MAX_BLOCK_ROWS, max(8, _next_power_of_two(rows // groups)))
    ends_E = jnp.cumsum(group_sizes_E)
    starts_E = ends_E - group_sizes_E
    filled = group_sizes_E > 0
    order_E = jnp.argsort(~filled, stable=True)

    def multiply_group(index: Array, out_Mo: Array) -> Array:
        group = order_E[index]
        # Fetched once, however many blocks it meets: XLA copies it.
        rhs_oi = rhs_Eoi[group]

        def multiply_block(index: Array, out_Mo: Array) -> Array:
            row = starts_E[group] + index * block
            block_Mi = jax.lax.dynamic_slice_in_dim(padded_Mi, row, block)
            product_Mo = jnp.einsum("mi,oi->mo", block_Mi, rhs_oi, preferred_element_type=jnp.float32)
            # A block may run past its group's last row: what it writes there is replaced when the next group's turn comes.
            return jax.lax.dynamic_update_slice_in_dim(out_Mo, product_Mo.astype(lhs_Mi.dtype), row, 0)

        return jax.lax.fori_loop(0, (group_sizes_E[group] + block - 1) // block, multiply_block, out_Mo)

    padded_Mi = jnp.pad(lhs_Mi, ((0, block), (0, 0)))
    out_Mo = jnp.zeros((rows + block, rhs_Eoi.shape[1]), lhs_Mi.dtype)
    out_Mo = jax.lax.fori_loop(0, jnp.sum(filled, dtype=jnp.int32), multiply_group, out_Mo)[:rows]
    # The last group's last block may have run past it.
    return jnp.where(jnp.arange(rows, dtype=jnp.int32)[:, None] < ends_E[-1], out_Mo, jnp.zeros((), out_Mo.dtype))


def _next_power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()

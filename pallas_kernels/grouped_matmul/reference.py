"""What :func:`pallas_kernels.grouped_matmul.grouped_matmul` computes, written out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def grouped_matmul(lhs_Mi: Float[Array, "M i"], rhs_Eio: Float[Array, "E i o"], group_sizes_E: Int32[Array, "E"]) -> Float[Array, "M o"]:
    """Each row times a copy of its group's matrix; zeros after the last group."""
    group_M = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(len(lhs_Mi), dtype=jnp.int32), side="right")
    rhs_Mio = rhs_Eio.astype(jnp.float32).at[group_M].get(mode="fill", fill_value=0)
    return jnp.einsum("mi,mio->mo", lhs_Mi.astype(jnp.float32), rhs_Mio, precision="highest").astype(lhs_Mi.dtype)

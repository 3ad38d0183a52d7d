"""What :func:`pallas_kernels.matmul.matmul` computes, written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def matmul(x_Bi: Float[Array, "*B i"], weight_oi: Float[Array, "o i"], *, dtype: jnp.dtype | None = None) -> Float[Array, "*B o"]:
    """Each row of ``x`` times each row of the matrix, in the widest type."""
    wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    product_Bo = jnp.einsum("...i,oi->...o", x_Bi.astype(wide), weight_oi.astype(wide), precision="highest")
    return product_Bo.astype(dtype or x_Bi.dtype)

"""The product as XLA lowers it, on any device."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def matmul(x_Bi: Float[Array, "*B i"], weight_oi: Float[Array, "o i"], *, dtype: jnp.dtype | None = None) -> Float[Array, "*B o"]:
    """One dot product."""
    return jnp.einsum("...i,oi->...o", x_Bi, weight_oi, preferred_element_type=dtype)

"""Products with weight matrices, which are stored [out, in]."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def linear(x_Bi: Float[Array, "*B i"], weight_fi: Float[Array, "f i"], *, dtype: jnp.dtype | None = None) -> Float[Array, "*B f"]:
    """``x @ weight.T``; ``dtype``: of the result, if it is not the operands'."""
    rows = math.prod(x_Bi.shape[:-1])
    if rows == 1 and x_Bi.dtype == jnp.bfloat16 and _on_cpu():
        # XLA's CPU backend widens the whole matrix to multiply one bfloat16 row, and uses native kernels from two rows on.
        x_2i = jnp.concatenate([x_Bi.reshape(1, -1), jnp.zeros((1, x_Bi.shape[-1]), x_Bi.dtype)])
        return linear(x_2i, weight_fi, dtype=dtype)[0].reshape(*x_Bi.shape[:-1], -1)
    return jnp.einsum("...i,fi->...f", x_Bi, weight_fi, preferred_element_type=dtype)


def _on_cpu() -> bool:
    """Whether what is being traced is for CPUs: programs run on a mesh, which may be of devices that this machine does not have."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "cpu"

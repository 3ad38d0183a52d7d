"""Products with weight matrices, which are stored [out, in]."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_FEW_ROWS = 16
"""On CPUs, most rows of float32 that are multiplied from the right: with more of them transposing costs what it gains."""


def linear(x_Bi: Float[Array, "*B i"], weight_oi: Float[Array, "o i"], *, dtype: jnp.dtype | None = None) -> Float[Array, "*B o"]:
    """``x @ weight.T``; ``dtype``: of the result, if it is not the operands'."""
    rows = math.prod(x_Bi.shape[:-1])
    if rows <= _FEW_ROWS and _on_cpu():
        x_Mi = x_Bi.reshape(rows, -1)
        if x_Bi.dtype == jnp.bfloat16 and rows == 1:
            # XLA's CPU backend widens the whole matrix to multiply one bfloat16 row, and uses native kernels from two rows on.
            return _product(_padded(x_Mi, 2), weight_oi, dtype)[0].reshape(*x_Bi.shape[:-1], -1)
        if x_Bi.dtype == jnp.float32 and rows > 1:
            # The matrix on the left: XLA's CPU kernels take up to half the time, in tiles of four columns. Without the barrier it
            # would be put on the right again.
            product_oM = jnp.einsum("fi,ri->fr", weight_oi, _padded(x_Mi, 4), preferred_element_type=dtype)
            return jax.lax.optimization_barrier(product_oM)[:, :rows].T.reshape(*x_Bi.shape[:-1], -1)
    return _product(x_Bi, weight_oi, dtype)


def _padded(x_Mi: Array, multiple: int) -> Array:
    """With rows of zeros, up to a multiple."""
    return jnp.pad(x_Mi, ((0, -len(x_Mi) % multiple), (0, 0)))


def _product(x_Bi: Array, weight_oi: Array, dtype: jnp.dtype | None) -> Array:
    return jnp.einsum("...i,fi->...f", x_Bi, weight_oi, preferred_element_type=dtype)


def _on_cpu() -> bool:
    """Whether what is being traced is for CPUs: programs run on a mesh, which may be of devices that this machine does not have."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "cpu"

"""Products of a few or many rows with a weight matrix, which is stored [out, in]."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.implementations import Implementation, first_supported
from pallas_kernels.matmul import cpu, xla

__all__ = ["matmul"]


IMPLEMENTATIONS = {"cpu": cpu.matmul, "xla": xla.matmul}


def matmul(
    x_Bi: Float[Array, "*B i"], weight_oi: Float[Array, "o i"], *, dtype: jnp.dtype | None = None, implementation: Implementation = None
) -> Float[Array, "*B o"]:
    """``x @ weight.T``, of two operands of one type; ``dtype``: of the result, if it is not the operands' type.

    Sums are float32 (float64 for float64 operands), whatever the types are. ``implementation``: as for
    :func:`pallas_kernels.implementations.first_supported`.
    """
    return first_supported("matmul", IMPLEMENTATIONS, implementation, x_Bi, weight_oi, dtype=dtype)

"""A SwiGLU block that all rows go through."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from pallas_kernels.matmul import matmul


def swiglu_block(x_BD: Float[Array, "*B D"], gate_up_2FD: Float[Array, "2 F D"], down_DF: Float[Array, "D F"]) -> Float[Array, "*B D"]:
    """``down @ (silu(gate @ x) * (up @ x))``; the hidden values have ``x``'s dtype."""
    width = gate_up_2FD.shape[1]
    gate_up_Bf = matmul(x_BD, gate_up_2FD.reshape(2 * width, -1))
    return matmul(jax.nn.silu(gate_up_Bf[..., :width]) * gate_up_Bf[..., width:], down_DF)

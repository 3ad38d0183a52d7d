"""Root-mean-square normalisation, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_normalize(x: Float[Array, "*B"], eps: float) -> Float[Array, "*B"]:
    """``x / sqrt(mean(x²) + eps)`` over the last axis, computed in float32 and returned in ``x``'s dtype.

    Llama 4's weightless QK-norm is this function; Hugging Face names it L2Norm, but it divides by the mean, not the sum.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)


def add_norm(
    x_BD: Float[Array, "*B D"], update_BD: Float[Array, "*B D"], scale_D: Float[Array, "D"], eps: float
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """The sum, then its norm."""
    sum_BD = x_BD + update_BD
    return sum_BD, rms_normalize(sum_BD, eps) * jnp.broadcast_to(scale_D, x_BD.shape)

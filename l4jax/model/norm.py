"""Root-mean-square normalisation, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from l4jax.model.weights import WeightSpec, declare


def rms_normalize(x: Float[Array, "*B"], eps: float) -> Float[Array, "*B"]:
    """``x / sqrt(mean(x²) + eps)`` over the last axis, computed in float32 and returned in ``x``'s dtype.

    Llama 4's weightless QK-norm is this function; Hugging Face names it L2Norm, but it divides by the mean, not the sum.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS normalisation with a learned scale. As in Llama, the scale is applied after the cast back to the model's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        self.eps = eps
        self.scale = declare(WeightSpec((size,), ("embed",), init="ones"))

    def __call__(self, x_BTD: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise over the last axis, then scale."""
        scale_D = self.scale[...]
        return rms_normalize(x_BTD, self.eps) * jnp.broadcast_to(scale_D, x_BTD.shape)

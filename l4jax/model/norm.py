"""Root-mean-square normalisation with learned scales."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from l4jax.model.weights import WeightSpec, declare
from pallas_kernels.norm import rms_normalize


class RMSNorm(nnx.Module):
    """RMS normalisation with a learned scale. As in Llama, the scale is applied after the cast back to the model's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        self.eps = eps
        self.scale = declare(WeightSpec((size,), ("embed",), init="ones"))

    def __call__(self, x_BTD: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise over the last axis, then scale."""
        scale_D = self.scale[...]
        return rms_normalize(x_BTD, self.eps) * jnp.broadcast_to(scale_D, x_BTD.shape)

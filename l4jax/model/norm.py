"""Root-mean-square normalisation with learned scales."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from l4jax.model.weights import WeightSpec, declare
from pallas_kernels.norm import add_norm, rms_normalize


class RMSNorm(nnx.Module):
    """RMS normalisation with a learned scale. As in Llama, the scale is applied after the cast back to the model's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        self.eps = eps
        self.scale = declare(WeightSpec((size,), ("embed",), init="ones"))

    def __call__(self, x_BTD: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise over the last axis, then scale."""
        scale_D = self.scale[...]
        return rms_normalize(x_BTD, self.eps) * jnp.broadcast_to(scale_D, x_BTD.shape)

    def add_norm(
        self, x_BTD: Float[Array, "*B D"], update_BTD: Float[Array, "*B D"] | None
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
        """``x + update`` (None: no update), and its norm."""
        if update_BTD is None:
            return x_BTD, self(x_BTD)
        return add_norm(x_BTD, update_BTD, self.scale[...], eps=self.eps)

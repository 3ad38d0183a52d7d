"""What :func:`pallas_kernels.experts.experts` computes, written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.experts.weights import Experts


def experts(
    x_MD: Float[Array, "M D"], score_M: Float32[Array, "M"] | None, expert_M: Int32[Array, "M"], routed: Experts, shared: Experts | None
) -> Float32[Array, "M D"]:
    """Every row through a copy of its expert, in float32."""
    x32_MD = x_MD.astype(jnp.float32)
    scaled_MD = x32_MD if score_M is None else x32_MD * score_M[:, None]
    some_M = (expert_M >= 0) & (expert_M < len(routed.down_EDF))
    chosen_MD = _blocks(scaled_MD, routed, jnp.where(some_M, expert_M, 0))
    out_MD = jnp.where(some_M[:, None], chosen_MD, 0.0)
    return out_MD if shared is None else out_MD + _blocks(x32_MD, shared, jnp.zeros_like(expert_M))


def _blocks(x_MD: Array, weights: Experts, expert_M: Array) -> Array:
    gate_up_M2FD, down_MDF = (leaf.astype(jnp.float32)[expert_M] for leaf in (weights.gate_up_E2FD, weights.down_EDF))
    gate_up_M2F = jnp.einsum("md,mpfd->mpf", x_MD, gate_up_M2FD, precision="highest")
    return jnp.einsum("mf,mdf->md", jax.nn.silu(gate_up_M2F[:, 0]) * gate_up_M2F[:, 1], down_MDF, precision="highest")

"""Experts as XLA lowers them, on any device: rows sorted by expert, and a loop over the experts that have rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.experts.dense import swiglu_block
from pallas_kernels.experts.grouped import grouped_matmul
from pallas_kernels.experts.weights import Experts, scaled


def experts(
    x_MD: Float[Array, "M D"],
    score_M: Float32[Array, "M"] | None,
    expert_M: Int32[Array, "M"],
    routed: Experts,
    shared: Experts | None,
    shared_here: Bool[Array, ""] | None,
) -> Float[Array, "M D"]:
    """Two grouped products with SwiGLU between them, and the shared block beside them."""
    E, _, F, D = routed.gate_up_E2FD.shape
    with jax.named_scope("routed_experts"):
        # Rows without an expert have number E: they are sorted last.
        order_M, size_E = jnp.argsort(expert_M), jnp.bincount(expert_M, length=E).astype(jnp.int32)
        gate_up_Mf = grouped_matmul(scaled(x_MD, score_M)[order_M], routed.gate_up_E2FD.reshape(E, 2 * F, D), size_E)
        hidden_MF = jax.nn.silu(gate_up_Mf[:, :F]) * gate_up_Mf[:, F:]
        out_MD = grouped_matmul(hidden_MF, routed.down_EDF, size_E)
        routed_MD = jnp.zeros_like(out_MD).at[order_M].set(out_MD, unique_indices=True)
    if shared is None:
        return routed_MD
    with jax.named_scope("shared_expert"):
        shared_MD = swiglu_block(x_MD, shared.gate_up_E2FD[0], shared.down_EDF[0])
        if shared_here is not None:
            shared_MD = jnp.where(shared_here, shared_MD, jnp.zeros_like(shared_MD))
    return shared_MD + routed_MD

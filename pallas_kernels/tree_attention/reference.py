"""What :func:`pallas_kernels.tree_attention.tree_attention` computes, written out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.flash_attention.reference import attend_masked
from pallas_kernels.merge import Partial


def tree_attention(
    q_BNKGh: Float[Array, "B N K G h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    sees_BNS: Bool[Array, "B N S"],
    k_PKph: Float[Array, "P K p h"],
    v_PKph: Float[Array, "P K p h"],
    pages_BW: Int32[Array, "B W"],
    prefix_start_BN: Int32[Array, "B N"],
    prefix_end_BN: Int32[Array, "B N"],
    *,
    scale: float,
) -> Partial:
    """One softmax over cached keys and tree keys, under one mask."""
    B, (_, K, p, h) = len(pages_BW), k_PKph.shape
    slots = pages_BW.shape[1] * p

    def joined(pool_PKph: Array, tree_BSKh: Array) -> Array:
        return jnp.concatenate([jnp.swapaxes(pool_PKph[pages_BW], 2, 3).reshape(B, slots, K, h), tree_BSKh], axis=1)

    slot_11S = jnp.arange(slots, dtype=jnp.int32)[None, None]
    cached_BNS = (slot_11S >= prefix_start_BN[..., None]) & (slot_11S < prefix_end_BN[..., None])
    visible_BNS = jnp.concatenate([cached_BNS, sees_BNS], axis=2)
    return attend_masked(q_BNKGh, joined(k_PKph, k_BSKh), joined(v_PKph, v_BSKh), visible_BNS, scale=scale)

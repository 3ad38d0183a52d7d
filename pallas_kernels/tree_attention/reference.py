"""What :func:`pallas_kernels.tree_attention.tree_attention` computes, written out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.flash_attention.reference import attend_masked
from pallas_kernels.keys import PagedKeys, TreeKeys
from pallas_kernels.merge import Partial


def tree_attention(q_BNKGh: Float[Array, "B N K G h"], tree: TreeKeys, prefix: PagedKeys, *, scale: float) -> Partial:
    """One softmax over cached keys and tree keys, under one mask. Pages that no node sees are taken as zeros, whatever is in them."""
    pages_BW, (_, K, p, h) = prefix.pages_BW, prefix.k_PKph.shape
    B, slots = len(pages_BW), pages_BW.shape[1] * p
    start_BN, end_BN = prefix.interval.start_BT, prefix.interval.end_BT
    slot_11S = jnp.arange(slots, dtype=jnp.int32)[None, None]
    cached_BNS = (slot_11S >= start_BN[..., None]) & (slot_11S < end_BN[..., None])
    seen_BW = jnp.any(cached_BNS.reshape(B, -1, pages_BW.shape[1], p), axis=(1, 3))

    def joined(pool_PKph: Array, tree_BSKh: Array) -> Array:
        page_BWKph = jnp.where(seen_BW[:, :, None, None, None], pool_PKph[pages_BW], 0)
        return jnp.concatenate([jnp.swapaxes(page_BWKph, 2, 3).reshape(B, slots, K, h), tree_BSKh], axis=1)

    keys, values = joined(prefix.k_PKph, tree.k_BSKh), joined(prefix.v_PKph, tree.v_BSKh)
    return attend_masked(q_BNKGh, keys, values, jnp.concatenate([cached_BNS, tree.sees_BNS], axis=2), scale=scale)

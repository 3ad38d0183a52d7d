"""What :func:`pallas_kernels.tree_attention.tree_attention` computes, written out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.flash_attention.reference import attend_masked
from pallas_kernels.keys import PagedKeys, TreeKeys
from pallas_kernels.merge import Partial


def tree_attention(q_BNKGh: Float[Array, "B N K G h"], tree: TreeKeys | None, prefix: PagedKeys, *, scale: float) -> Partial:
    """One softmax over cached keys and tree keys, under one mask. Pages that no node sees are taken as zeros, whatever is in them."""
    pages_BW, (_, K, p, h) = prefix.pages_BW, prefix.k_PKph.shape
    B, slots = len(pages_BW), pages_BW.shape[1] * p
    start_BN, end_BN = prefix.interval.start_BT, prefix.interval.end_BT
    slot_11S = jnp.arange(slots, dtype=jnp.int32)[None, None]
    cached_BNS = (slot_11S >= start_BN[..., None]) & (slot_11S < end_BN[..., None])
    seen_BW = jnp.any(cached_BNS.reshape(B, -1, pages_BW.shape[1], p), axis=(1, 3))

    def cached(pool_PKph: Array) -> Array:
        page_BWKph = jnp.where(seen_BW[:, :, None, None, None], pool_PKph[pages_BW], 0)
        return jnp.swapaxes(page_BWKph, 2, 3).reshape(B, slots, K, h)

    keys, values, sees = cached(prefix.k_PKph), cached(prefix.v_PKph), cached_BNS
    if tree is not None:
        joined = ((keys, tree.k_BSKh, 1), (values, tree.v_BSKh, 1), (sees, tree.sees_BNS, 2))
        keys, values, sees = (jnp.concatenate([a, b], axis=axis) for a, b, axis in joined)
    return attend_masked(q_BNKGh, keys, values, sees, scale=scale)

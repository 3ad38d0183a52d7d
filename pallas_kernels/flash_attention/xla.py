"""Interval attention as XLA lowers it, on any device: over new keys at once, over a paged KV cache page by page."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.flash_attention.blocks import Block, attend_block, inside, merge_blocks, no_keys, normalize, scores
from pallas_kernels.merge import Partial


def attend(
    q_BTKGh: Float[Array, "B T K G h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    start_BT: Int32[Array, "B T"],
    end_BT: Int32[Array, "B T"],
    *,
    scale: float,
) -> Partial:
    """All scores at once, those outside the intervals masked."""
    return attend_masked(q_BTKGh, k_BSKh, v_BSKh, inside(start_BT, end_BT, jnp.int32(0), k_BSKh.shape[1]), scale=scale)


def attend_masked(
    q_BTKGh: Float[Array, "B T K G h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    visible_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
) -> Partial:
    """All scores at once."""
    k_BKSh, v_BKSh = (jnp.swapaxes(a, 1, 2) for a in (k_BSKh, v_BSKh))
    return normalize(attend_block(scores(q_BTKGh, k_BKSh, scale), v_BKSh, visible_BTS))


def attend_pages(
    q_BTKGh: Float[Array, "B T K G h"],
    k_PKph: Float[Array, "P K p h"],
    v_PKph: Float[Array, "P K p h"],
    pages_BW: Int32[Array, "B W"],
    start_BT: Int32[Array, "B T"],
    end_BT: Int32[Array, "B T"],
    *,
    scale: float,
) -> Partial:
    """A loop over pages, from the earliest start to the longest row's end."""
    page_size = k_PKph.shape[2]

    def step(index: Array, before: Block) -> Block:
        page_B = jax.lax.dynamic_index_in_dim(pages_BW, index, axis=1, keepdims=False)
        k_BKph = k_PKph.at[page_B].get(mode="promise_in_bounds")
        v_BKph = v_PKph.at[page_B].get(mode="promise_in_bounds")
        visible_BTp = inside(start_BT, end_BT, (index * page_size).astype(jnp.int32), page_size)
        return merge_blocks(before, attend_block(scores(q_BTKGh, k_BKph, scale), v_BKph, visible_BTp))

    first, last = jnp.min(start_BT) // page_size, (jnp.max(end_BT) + page_size - 1) // page_size
    return normalize(jax.lax.fori_loop(first, last, step, no_keys(q_BTKGh)))

"""Interval attention as XLA lowers it, on any device: over new keys at once, over a paged KV cache in blocks of pages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.flash_attention.blocks import Block, attend_block, inside, merge_blocks, no_keys, normalize, scores
from pallas_kernels.keys import PagedKeys
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
    cached: PagedKeys,
    *,
    scale: float,
    apart: bool = False,
    block: int = 1,
) -> Partial:
    """A loop over blocks of ``block`` pages, from the earliest start to the longest row's end.

    Blocks begin at multiples of ``block`` pages, wherever other rows start and end, so rows are always computed apart.
    """
    del apart
    k_PKph, v_PKph, pages_BW = cached.k_PKph, cached.v_PKph, cached.pages_BW
    start_BT, end_BT = cached.interval.start_BT, cached.interval.end_BT
    B = len(pages_BW)
    _, K, page_size, h = k_PKph.shape
    first, last = jnp.min(start_BT) // page_size, (jnp.max(end_BT) + page_size - 1) // page_size

    def step(turn: Array, before: Block) -> Block:
        index = turn * block
        # The outer blocks are filled up with the first and the last page that is attended: their keys are masked there.
        index_W = jnp.clip(index + jnp.arange(block, dtype=jnp.int32), first, last - 1)
        page_BW = jnp.take(pages_BW, index_W, axis=1, mode="clip")

        def keys(pool_PKph: Array) -> Array:
            page_BWKph = pool_PKph.at[page_BW].get(mode="promise_in_bounds")
            return jnp.swapaxes(page_BWKph, 1, 2).reshape(B, K, block * page_size, h)

        visible_BTS = inside(start_BT, end_BT, (index * page_size).astype(jnp.int32), block * page_size)
        return merge_blocks(before, attend_block(scores(q_BTKGh, keys(k_PKph), scale), keys(v_PKph), visible_BTS))

    return normalize(jax.lax.fori_loop(first // block, (last + block - 1) // block, step, no_keys(q_BTKGh)))

"""Attention of a few queries over a paged KV cache, on CPUs: several pages at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.flash_attention.blocks import Block, attend_block, inside, merge_blocks, no_keys, normalize
from pallas_kernels.implementations import require_cpu
from pallas_kernels.keys import PagedKeys
from pallas_kernels.merge import Partial

_MOST_QUERIES = 32
"""Most queries of a row. With more, computing scores takes longer than reading pages, and one page at a time is as fast."""

_MOST_PAGES = 4
"""Pages of a row that are attended together. Larger blocks leave more pages at the end, which are attended one by one."""

_BLOCK_BYTES = 8 << 20
"""Most bytes of keys and values that are copied together: about what cores keep in their caches."""


def attend_pages(
    q_BTKGh: Float[Array, "B T K G h"],
    cached: PagedKeys,
    *,
    scale: float,
    apart: bool = False,
) -> Partial:
    """A loop over blocks of pages, then one over the pages that are left; for up to 32 queries a row.

    With ``apart`` it depends on a row alone which of its pages are attended together: blocks begin at multiples of their size, and a row's
    last pages, too few for a block, are attended one by one even where a longer row has a whole block. Those turns are more than the
    longest row needs, a quarter of the time for 8 rows of very different lengths, so without ``apart`` all rows take the longest's.

    Each turn of the loop starts about a dozen small kernels, however few tokens it attends, so it takes several pages at once. Matrix
    products need their keys side by side, so the pages are copied into one matrix. Keys and values narrower than float32 are widened in
    the copy, because XLA's CPU kernels are slower for a few bfloat16 rows.
    """
    require_cpu()
    if q_BTKGh.shape[1] > _MOST_QUERIES:
        raise NotImplementedError(f"{q_BTKGh.shape[1]} queries a row: pages are attended one by one as fast")
    k_PKph, v_PKph, pages_BW = cached.k_PKph, cached.v_PKph, cached.pages_BW
    start_BT, end_BT = cached.interval.start_BT, cached.interval.end_BT
    B, (P, K, p, h) = len(pages_BW), k_PKph.shape
    wide = jnp.dtype(jnp.float64 if q_BTKGh.dtype == jnp.float64 else jnp.float32)
    q_BTKGh = q_BTKGh.astype(wide)
    head_K = jnp.arange(K, dtype=jnp.int32)
    # XLA copies element by element unless it has something to compute, and it cannot know that this is a one.
    one = jax.lax.optimization_barrier(jnp.ones((), wide))

    def attend(index_B: Array, pages: int, end_BT: Array, before: Block) -> Block:
        # What is before the earliest start or after the longest row's end is masked; no page is read for it.
        index_BW = jnp.clip(index_B[:, None] + jnp.arange(pages, dtype=jnp.int32)[None, :], first, last - 1)
        page_BW = jnp.take_along_axis(pages_BW, index_BW, axis=1, mode="clip")
        row_BKW = page_BW[:, None, :] * K + head_K[None, :, None]

        def keys(pool_PKph: Array) -> Array:
            page_Mph = pool_PKph.reshape(P * K, p, h).at[row_BKW.reshape(-1)].get(mode="promise_in_bounds")
            # Without the barrier XLA might transpose the keys as it copies them, which takes several times as long.
            return jax.lax.optimization_barrier(page_Mph.astype(wide) * one).reshape(B, K, pages * p, h)

        first_B = (index_B * p).astype(jnp.int32)
        visible_BTS = inside(start_BT - first_B[:, None], end_BT - first_B[:, None], jnp.int32(0), pages * p)
        return merge_blocks(before, attend_block(_scores(q_BTKGh, keys(k_PKph), scale), keys(v_PKph), visible_BTS))

    first_B, last_B = jnp.min(start_BT, axis=1) // p, (jnp.max(end_BT, axis=1) + p - 1) // p
    first, last = jnp.min(first_B), jnp.max(last_B)
    block = min(_MOST_PAGES, _BLOCK_BYTES // (2 * B * K * p * h * wide.itemsize), pages_BW.shape[1])
    begin = jnp.zeros_like(first) if apart else first
    left_B = jnp.broadcast_to(begin, (B,))
    attended = no_keys(q_BTKGh)
    if block > 1:
        left_B = begin + ((last_B if apart else jnp.broadcast_to(last, (B,))) - begin) // block * block
        in_blocks_BT = jnp.minimum(end_BT, left_B[:, None] * p)

        def whole(turn: Array, before: Block) -> Block:
            return attend(jnp.broadcast_to(begin + turn * block, (B,)), block, in_blocks_BT, before)

        attended = jax.lax.fori_loop((first - begin) // block, (jnp.max(left_B) - begin) // block, whole, attended)

    def single(turn: Array, before: Block) -> Block:
        return attend(left_B + turn, 1, end_BT, before)

    turns = jnp.maximum(jnp.min(first_B - left_B), 0), jnp.max(last_B - left_B)
    return normalize(jax.lax.fori_loop(*turns, single, attended))


def _scores(q_BTKGh: Array, k_BKSh: Array, scale: float) -> Array:
    """Scaled products of queries and keys, [B, K, T, G, S], computed as keys times queries: otherwise XLA would transpose the keys."""
    B, T, K, G, h = q_BTKGh.shape
    q_BKMh = jnp.swapaxes(q_BTKGh, 1, 2).reshape(B, K, T * G, h)
    padded_BKMh = jnp.pad(q_BKMh, ((0, 0), (0, 0), (0, -T * G % 4), (0, 0)))
    scores_BKSM = jax.lax.optimization_barrier(jnp.einsum("bksh,bkrh->bksr", k_BKSh, padded_BKMh))[..., : T * G]
    return scale * jnp.swapaxes(scores_BKSM, 2, 3).reshape(B, K, T, G, -1)

"""Attention of a few queries over a paged KV cache, on CPUs: several pages at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.flash_attention.blocks import Block, attend_block, inside, merge_blocks, no_keys, normalize
from pallas_kernels.implementations import require_cpu
from pallas_kernels.merge import Partial

_MOST_QUERIES = 32
"""Most queries of a row; with more of them the scores of several pages no longer fit into the cores' caches."""

_BLOCK_BYTES = 1 << 20
"""About how many bytes of keys and values are copied together: what two cores keep in their second-level caches."""

_MOST_PAGES = 4
"""Most pages of a row in a block: what is left over by whole blocks is attended page by page."""


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
    """A loop over blocks of pages, and one over the pages that are left; for up to 32 queries a row.

    A page costs a dozen small kernels whatever is in it, and copying it is most of the work: XLA's products cannot read it in place.
    """
    require_cpu()
    if q_BTKGh.shape[1] > _MOST_QUERIES:
        raise NotImplementedError(f"{q_BTKGh.shape[1]} queries a row: pages are attended one by one as fast")
    B, (P, K, p, h) = len(pages_BW), k_PKph.shape
    row_K = jnp.arange(K, dtype=jnp.int32)

    def attend(index: Array, pages: int, before: Block) -> Block:
        page_BW = jax.lax.dynamic_slice_in_dim(pages_BW, index, pages, axis=1)
        # A page of a head is a row of one long matrix: such rows are gathered by a plain copy.
        row_BKW = page_BW[:, None, :] * K + row_K[None, :, None]

        def keys(pool_PKph: Array) -> Array:
            rows = pool_PKph.reshape(P * K, p * h).at[row_BKW.reshape(-1)].get(mode="promise_in_bounds")
            return rows.reshape(B, K, pages * p, h)

        visible_BTS = inside(start_BT, end_BT, (index * p).astype(jnp.int32), pages * p)
        return merge_blocks(before, attend_block(q_BTKGh, keys(k_PKph), keys(v_PKph), visible_BTS, scale))

    first, last = jnp.min(start_BT) // p, (jnp.max(end_BT) + p - 1) // p
    fitting = _BLOCK_BYTES // (2 * B * K * p * h * k_PKph.dtype.itemsize)
    block = min(max(2, min(_MOST_PAGES, fitting)), pages_BW.shape[1])
    blocks = (last - first) // block
    attended = jax.lax.fori_loop(0, blocks, lambda index, before: attend(first + index * block, block, before), no_keys(q_BTKGh))
    attended = jax.lax.fori_loop(first + blocks * block, last, lambda index, before: attend(index, 1, before), attended)
    return normalize(attended)

"""What the ops of :mod:`pallas_kernels.flash_attention` compute, written out."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.keys import NewKeys, PagedKeys
from pallas_kernels.merge import Partial
from pallas_kernels.merge.reference import merge_attention

_LOWEST = float(np.finfo(np.float32).min)
"""The highest score of a query that sees no key: finite, so that its weights are zero and not NaN."""


def attend(
    q_BTKGh: Float[Array, "B T K G h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    start_BT: Int32[Array, "B T"],
    end_BT: Int32[Array, "B T"],
    *,
    scale: float,
) -> Partial:
    """Keys with index in [start, end) are visible."""
    key_11S = jnp.arange(k_BSKh.shape[1], dtype=jnp.int32)[None, None]
    visible_BTS = (key_11S >= start_BT[..., None]) & (key_11S < end_BT[..., None])
    return attend_masked(q_BTKGh, k_BSKh, v_BSKh, visible_BTS, scale=scale)


def attend_masked(
    q_BTKGh: Float[Array, "B T K G h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    visible_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
) -> Partial:
    """Softmax over the visible keys, and the log of its denominator."""
    wide = jnp.float64 if q_BTKGh.dtype == jnp.float64 else jnp.float32
    q, k, v = (a.astype(wide) for a in (q_BTKGh, k_BSKh, v_BSKh))
    scores = scale * jnp.einsum("btkgh,bskh->btkgs", q, k, precision="highest")
    scores = jnp.where(visible_BTS[:, :, None, None], scores, -jnp.inf)
    highest = jnp.max(scores, axis=-1, keepdims=True, initial=_LOWEST)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("btkgs,bskh->btkgh", weights, v, precision="highest") / jnp.where(total == 0, 1, total)[..., None]
    return out, jnp.log(total) + highest[..., 0]


def attend_pages(
    q_BTKGh: Float[Array, "B T K G h"],
    cached: PagedKeys,
    *,
    scale: float,
) -> Partial:
    """All pages of the table in a row; those outside the longest interval are taken as zeros, whatever is in them."""
    k_PKph, v_PKph, pages_BW = cached.k_PKph, cached.v_PKph, cached.pages_BW
    start_BT, end_BT = cached.interval.start_BT, cached.interval.end_BT
    pages, size = pages_BW.shape[1], k_PKph.shape[2]
    page_W = jnp.arange(pages, dtype=jnp.int32)
    read_W = (page_W >= jnp.min(start_BT) // size) & (page_W < -(-jnp.max(end_BT) // size))

    def keys(pool_PKph: Array) -> Array:
        page_BWKph = jnp.where(read_W[None, :, None, None, None], pool_PKph[pages_BW], 0)
        return jnp.swapaxes(page_BWKph, 2, 3).reshape(len(pages_BW), pages * size, *page_BWKph.shape[2::2])

    return attend(q_BTKGh, keys(k_PKph), keys(v_PKph), start_BT, end_BT, scale=scale)


def flash_attention(q_BTKGh: Float[Array, "B T K G h"], new: NewKeys, cached: PagedKeys | None, *, scale: float) -> Partial:
    """Attention over the pages and over the new keys, merged."""
    if cached is None:
        return attend(q_BTKGh, new.k_BSKh, new.v_BSKh, new.interval.start_BT, new.interval.end_BT, scale=scale)
    parts = attend_pages(q_BTKGh, cached, scale=scale), flash_attention(q_BTKGh, new, None, scale=scale)
    return merge_attention(parts)

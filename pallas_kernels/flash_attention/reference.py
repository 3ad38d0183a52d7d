"""Interval attention in plain JAX: over new keys in one piece, over a paged KV cache page by page.

A query attends the keys with index in [start, end): causal, chunk-local, prefix and padding masks are all intervals.
All functions return the attention output and the log of the softmax denominator in float32 (float64 for float64 inputs); a query
that sees no key gets zeros and -inf, which :func:`sharding.merge.merge_attention` takes as nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

Partial = tuple[Float[Array, "B T K G h"], Float[Array, "B T K G"]]


def attend(
    q_BTKGh: Float[Array, "B T K G h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    start_BT: Int32[Array, "B T"],
    end_BT: Int32[Array, "B T"],
    *,
    scale: float,
) -> Partial:
    """Attention of each query over the keys in its interval; scores are multiplied by ``scale``."""
    return attend_masked(q_BTKGh, k_BSKh, v_BSKh, _inside(start_BT, end_BT, jnp.int32(0), k_BSKh.shape[1]), scale=scale)


def attend_masked(
    q_BTKGh: Float[Array, "B T K G h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    visible_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
) -> Partial:
    """Attention of each query over the keys that are visible to it, for the few masks that are no intervals: those of draft trees."""
    k_BKSh, v_BKSh = (jnp.swapaxes(a, 1, 2) for a in (k_BSKh, v_BSKh))
    return _normalize(_softmax_block(_scores(q_BTKGh, k_BKSh, visible_BTS, scale), v_BKSh))


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
    """Attention over a paged cache: key ``s`` of row ``b`` is token ``s % p`` of page ``pages_BW[b, s // p]``.

    Reads the pages from the earliest start to the longest row's end and no others, however large the cache is.
    """
    B, T, K, G, h = q_BTKGh.shape
    page_size = k_PKph.shape[2]

    def step(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        page_B = jax.lax.dynamic_index_in_dim(pages_BW, index, axis=1, keepdims=False)
        k_BKph = k_PKph.at[page_B].get(mode="promise_in_bounds")
        v_BKph = v_PKph.at[page_B].get(mode="promise_in_bounds")
        visible_BTp = _inside(start_BT, end_BT, (index * page_size).astype(jnp.int32), page_size)
        return _merge_block(carry, _softmax_block(_scores(q_BTKGh, k_BKph, visible_BTp, scale), v_BKph))

    accumulator = _accumulator(q_BTKGh)
    nothing = (
        jnp.zeros((B, K, T, G, h), accumulator),
        jnp.full((B, K, T, G), -jnp.inf, accumulator),
        jnp.zeros((B, K, T, G), accumulator),
    )
    first, last = jnp.min(start_BT) // page_size, (jnp.max(end_BT) + page_size - 1) // page_size
    return _normalize(jax.lax.fori_loop(first, last, step, nothing))


def _inside(start_BT: Array, end_BT: Array, first_key: Array, keys: int) -> Array:
    """Which of ``keys`` keys, numbered from ``first_key``, lie in each query's interval: [B, T, S]."""
    key_11S = (first_key + jnp.arange(keys, dtype=jnp.int32))[None, None, :]
    return (key_11S >= start_BT[:, :, None]) & (key_11S < end_BT[:, :, None])


def _scores(q_BTKGh: Array, k_BKSh: Array, visible_BTS: Array, scale: float) -> Array:
    """Masked scores [B, K, T, G, S]."""
    # Scaled here and not in the queries: in half precision those would be rounded once more.
    scores_BKTGS = scale * jnp.einsum("btkgh,bksh->bktgs", q_BTKGh, k_BKSh, preferred_element_type=_accumulator(q_BTKGh))
    return jnp.where(visible_BTS[:, None, :, None, :], scores_BKTGS, -jnp.inf)


def _softmax_block(scores_BKTGS: Array, v_BKSh: Array) -> tuple[Array, Array, Array]:
    """(unnormalised output, highest score, sum of exponentials) over one block of keys."""
    highest = jnp.max(scores_BKTGS, axis=-1)
    # A block that hides every key from a query has highest = -inf; exp(-inf - 0) = 0 keeps it out, where -inf + inf is NaN.
    exponentials = jnp.exp(scores_BKTGS - _finite(highest)[..., None])
    out_BKTGh = jnp.einsum("bktgs,bksh->bktgh", exponentials.astype(v_BKSh.dtype), v_BKSh, preferred_element_type=exponentials.dtype)
    return out_BKTGh, highest, jnp.sum(exponentials, axis=-1)


def _merge_block(a: tuple[Array, Array, Array], b: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Online softmax: two unnormalised blocks brought to their common highest score."""
    highest = jnp.maximum(a[1], b[1])
    scale_a, scale_b = jnp.exp(a[1] - _finite(highest)), jnp.exp(b[1] - _finite(highest))
    return a[0] * scale_a[..., None] + b[0] * scale_b[..., None], highest, a[2] * scale_a + b[2] * scale_b


def _normalize(block: tuple[Array, Array, Array]) -> Partial:
    out_BKTGh, highest, total = block
    out = out_BKTGh / jnp.where(total == 0.0, 1.0, total)[..., None]
    lse = jnp.log(total) + _finite(highest)
    return jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2)


def _finite(highest: Array) -> Array:
    return jnp.where(jnp.isneginf(highest), 0.0, highest)


def _accumulator(array: Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)

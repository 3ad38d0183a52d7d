"""Online softmax: attention over one block of keys after the other (arXiv 2205.14135, algorithm 1)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.merge import Partial

Block = tuple[Array, Array, Array]
"""Attention over some keys: its output times the sum of exponentials, the highest score, and that sum; [B, K, T, G, h] and [B, K, T, G]."""


def inside(start_BT: Array, end_BT: Array, first_key: Array, keys: int) -> Array:
    """Which of ``keys`` keys, numbered from ``first_key``, are in each query's interval: [B, T, S]."""
    key_11S = (first_key + jnp.arange(keys, dtype=jnp.int32))[None, None, :]
    return (key_11S >= start_BT[:, :, None]) & (key_11S < end_BT[:, :, None])


def no_keys(q_BTKGh: Array) -> Block:
    """Attention over nothing."""
    B, T, K, G, h = q_BTKGh.shape
    accumulator = _accumulator(q_BTKGh)
    return (
        jnp.zeros((B, K, T, G, h), accumulator),
        jnp.full((B, K, T, G), -jnp.inf, accumulator),
        jnp.zeros((B, K, T, G), accumulator),
    )


def scores(q_BTKGh: Array, k_BKSh: Array, scale: float) -> Array:
    """Scaled products of queries and keys: [B, K, T, G, S]."""
    # Scaled here and not in the queries: in half precision those would be rounded once more.
    return scale * jnp.einsum("btkgh,bksh->bktgs", q_BTKGh, k_BKSh, preferred_element_type=_accumulator(q_BTKGh))


def attend_block(scores_BKTGS: Array, v_BKSh: Array, visible_BTS: Array) -> Block:
    """Attention over the visible keys of one block."""
    scores_BKTGS = jnp.where(visible_BTS[:, None, :, None, :], scores_BKTGS, -jnp.inf)
    highest = jnp.max(scores_BKTGS, axis=-1)
    # A block that hides every key from a query has highest = -inf; exp(-inf - 0) = 0 keeps it out, where -inf + inf is NaN.
    exponentials = jnp.exp(scores_BKTGS - _finite(highest)[..., None])
    out_BKTGh = jnp.einsum("bktgs,bksh->bktgh", exponentials.astype(v_BKSh.dtype), v_BKSh, preferred_element_type=exponentials.dtype)
    return out_BKTGh, highest, jnp.sum(exponentials, axis=-1)


def merge_blocks(a: Block, b: Block) -> Block:
    """Attention over the keys of both blocks."""
    highest = jnp.maximum(a[1], b[1])
    scale_a, scale_b = jnp.exp(a[1] - _finite(highest)), jnp.exp(b[1] - _finite(highest))
    return a[0] * scale_a[..., None] + b[0] * scale_b[..., None], highest, a[2] * scale_a + b[2] * scale_b


def normalize(block: Block) -> Partial:
    """Output and log-sum-exp, [B, T, K, G, h] and [B, T, K, G]; zeros and -inf for a query that saw nothing."""
    out_BKTGh, highest, total = block
    out = out_BKTGh / jnp.where(total == 0.0, 1.0, total)[..., None]
    lse = jnp.log(total) + _finite(highest)
    return jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2)


def _finite(highest: Array) -> Array:
    return jnp.where(jnp.isneginf(highest), 0.0, highest)


def _accumulator(array: Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)

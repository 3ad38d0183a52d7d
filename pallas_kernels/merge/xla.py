"""Merging partial attentions by their log-sum-exp."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

Partial = tuple[Float[Array, "*B h"], Float[Array, "*B"]]


def merge_attention(partials: Sequence[Partial]) -> Partial:
    """Attention over the union of disjoint key sets, from the attention over each.

    Each partial is ``(out, lse)``, float32 or float64: the softmax-weighted values over its keys and the log of its softmax
    denominator. ``out = Σ out_i exp(lse_i - lse)`` with ``lse = log Σ exp(lse_i)`` (arXiv 2411.01783, appendix). A
    partial over no keys has ``lse = -inf`` and any finite ``out``: it takes no part.
    """
    # Element by element, without an array of all partials, so that XLA makes one kernel of it.
    outs, lses = zip(*partials, strict=True)
    highest = functools.reduce(jnp.maximum, lses)
    safe = jnp.where(jnp.isneginf(highest), 0.0, highest)
    weights = [jnp.exp(lse - safe) for lse in lses]
    total = functools.reduce(jnp.add, weights)
    denominator = jnp.where(total == 0.0, 1.0, total)
    out = functools.reduce(jnp.add, [weight[..., None] * out for weight, out in zip(weights, outs, strict=True)])
    return out / denominator[..., None], jnp.log(total) + safe


def merge_splits(
    out_BKzMh: Float32[Array, "B K z M h"], lse_BKzM: Float32[Array, "B K z M"], N: int, G: int, dtype: Any
) -> Float[Array, "B N K G h"]:
    """By :func:`merge_attention`, of the first N G rows."""
    B, K, splits, _, h = out_BKzMh.shape
    out_BKMh, _ = merge_attention([(out_BKzMh[:, :, z, : N * G], lse_BKzM[:, :, z, : N * G]) for z in range(splits)])
    return jnp.swapaxes(out_BKMh.reshape(B, K, N, G, h), 1, 2).astype(dtype)

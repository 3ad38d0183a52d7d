"""Merging partial attentions by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

Partial = tuple[Float[Array, "*B h"], Float[Array, "*B"]]


def merge_attention(partials: Sequence[Partial]) -> Partial:
    """Attention over the union of disjoint key sets, from the attention over each.

    Each partial is ``(out, lse)``, float32 or float64: the softmax-weighted values over its keys and the log of its softmax
    denominator. ``out = Σ out_i exp(lse_i - lse)`` with ``lse = log Σ exp(lse_i)`` (arXiv 2411.01783, appendix). A
    partial over no keys has ``lse = -inf`` and any finite ``out``: it takes no part.
    """
    lse_stack = jnp.stack([lse for _, lse in partials])
    highest = jnp.max(lse_stack, axis=0)
    safe = jnp.where(jnp.isneginf(highest), 0.0, highest)
    weights = jnp.exp(lse_stack - safe[None])
    total = jnp.sum(weights, axis=0)
    denominator = jnp.where(total == 0.0, 1.0, total)
    out = sum(w[..., None] * o for w, (o, _) in zip(weights, partials, strict=True)) / denominator[..., None]
    return out, jnp.log(total) + safe

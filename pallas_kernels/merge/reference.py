"""What :func:`pallas_kernels.merge.merge_attention` computes, written out."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.merge.xla import Partial


def merge_attention(partials: Sequence[Partial]) -> Partial:
    """Each partial's output times its share of the softmax denominator."""
    out_n, lse_n = (jnp.stack(parts) for parts in zip(*partials, strict=True))
    share_n = jnp.where(jnp.isneginf(lse_n), 0.0, jax.nn.softmax(lse_n, axis=0))
    return jnp.sum(share_n[..., None] * out_n, axis=0), jax.nn.logsumexp(lse_n, axis=0)

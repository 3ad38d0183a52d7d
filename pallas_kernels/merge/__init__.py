"""Merging partial attentions by their log-sum-exp."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float32

from pallas_kernels.implementations import Implementation, first_supported
from pallas_kernels.merge import hopper, xla
from pallas_kernels.merge.xla import Partial, merge_attention

__all__ = ["Partial", "merge_attention", "merge_splits"]

IMPLEMENTATIONS = {"hopper": hopper.merge_splits, "xla": xla.merge_splits}


def merge_splits(
    out_BKzMh: Float32[jax.Array, "B K z M h"],
    lse_BKzM: Float32[jax.Array, "B K z M"],
    N: int,
    G: int,
    dtype: Any,
    *,
    implementation: Implementation = None,
) -> Partial:
    """Attention over all keys, from that over each of ``z`` splits of them, as tree attention's kernel leaves it.

    The first N x G of M rows are the G query heads of N nodes; the others, and their log-sum-exps, mean nothing. A split without keys has
    zeros and -inf. Returns the output, [B, N, K, G, h], in ``dtype``, and the log-sum-exp, [B, N, K, G].
    ``implementation``: as for :func:`pallas_kernels.implementations.first_supported`.
    """
    B, K, _, _, _ = out_BKzMh.shape
    out_BNKGh = first_supported("merge_splits", IMPLEMENTATIONS, implementation, out_BKzMh, lse_BKzM, N, G, dtype)
    # Without callers that use it, XLA drops it.
    lse_BKM = jax.nn.logsumexp(lse_BKzM[..., : N * G], axis=2)
    return out_BNKGh, jnp.swapaxes(lse_BKM.reshape(B, K, N, G), 1, 2)

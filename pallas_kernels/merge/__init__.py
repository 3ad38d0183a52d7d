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
    """Merge the splits of tree attention into attention over all keys.

    Of the M rows the first N G are used: N nodes, each with its G query heads. A split without keys must have zeros and -inf. Returns the
    output, [B, N, K, G, h], in ``dtype`` (a floating-point type), and the log-sum-exp, [B, N, K, G], in float32.
    ``implementation``: as for :func:`pallas_kernels.implementations.first_supported`.
    """
    B, K, _, _, _ = out_BKzMh.shape
    out_BNKGh = first_supported("merge_splits", IMPLEMENTATIONS, implementation, out_BKzMh, lse_BKzM, N, G, dtype)
    # XLA removes this if no caller uses it.
    lse_BKM = jax.nn.logsumexp(lse_BKzM[..., : N * G], axis=2)
    return out_BNKGh, jnp.swapaxes(lse_BKM.reshape(B, K, N, G), 1, 2)

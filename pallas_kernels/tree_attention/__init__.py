"""Exact attention of a draft tree's nodes: over the cached prefix, which all may see, and over each other, by the tree's mask."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.implementations import Implementation, first_supported
from pallas_kernels.keys import PagedKeys, TreeKeys
from pallas_kernels.merge import Partial
from pallas_kernels.tree_attention import hopper, xla

__all__ = ["tree_attention"]

IMPLEMENTATIONS = {"hopper": hopper.tree_attention, "xla": xla.tree_attention}


def tree_attention(
    q_BNKGh: Float[Array, "B N K G h"],
    tree: TreeKeys | None,
    prefix: PagedKeys,
    *,
    scale: float,
    apart: bool = False,
    dtype: Any = None,
    implementation: Implementation = None,
) -> Partial:
    """Attention of each node over the cached keys in its interval and over the tree's keys that it sees (arXiv 2508.08192).

    ``tree`` is None for decoding: the one node's own key is cached already. Scores are multiplied by ``scale``. Returns the output,
    [B, N, K, G, h], and the log-sum-exp of the scores, [B, N, K, G], in float32 (float64 for float64 inputs); zeros and -inf for a node
    that sees nothing. ``dtype``: the output's, if it is to be rounded.

    ``apart``: a row's result is the same to the last bit whatever the other rows are. ``implementation``: as for
    :func:`pallas_kernels.implementations.first_supported`. Tokens that nobody sees must be finite in every page that a row's table names
    between the earliest start and the longest row's end.
    """
    return first_supported("tree_attention", IMPLEMENTATIONS, implementation, q_BNKGh, tree, prefix, scale=scale, apart=apart, dtype=dtype)

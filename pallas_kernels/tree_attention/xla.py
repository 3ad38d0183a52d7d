"""Tree attention in plain JAX: the long prefix without a mask, the short suffix with one, merged by their log-sum-exp.

So the mask is as large as the tree, not as the context (arXiv 2508.08192, section on tree attention).
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.flash_attention import attend_masked, attend_pages
from pallas_kernels.merge import Partial, merge_attention


def tree_attention(
    q_BNKGh: Float[Array, "B N K G h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    sees_BNS: Bool[Array, "B N S"],
    k_PKph: Float[Array, "P K p h"],
    v_PKph: Float[Array, "P K p h"],
    pages_BW: Int32[Array, "B W"],
    prefix_start_BN: Int32[Array, "B N"],
    prefix_end_BN: Int32[Array, "B N"],
    *,
    scale: float,
    apart: bool = False,
) -> Partial:
    """Attention of each node over the cache slots [start, end) and over the tree's keys that ``sees_BNS`` marks.

    Cache slot ``s`` of row ``b`` is token ``s % p`` of page ``pages_BW[b, s // p]``. Scores are multiplied by ``scale``. Returns
    output and log-sum-exp in float32 (float64 for float64 inputs); zeros and -inf for a node that sees nothing. ``apart`` is as in
    :func:`pallas_kernels.flash_attention.attend_pages`.
    """
    prefix = attend_pages(q_BNKGh, k_PKph, v_PKph, pages_BW, prefix_start_BN, prefix_end_BN, scale=scale, apart=apart)
    suffix = attend_masked(q_BNKGh, k_BSKh, v_BSKh, sees_BNS, scale=scale)
    return merge_attention([prefix, suffix])

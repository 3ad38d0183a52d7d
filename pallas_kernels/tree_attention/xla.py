"""Tree attention as XLA lowers it, on any device: the long prefix without a mask, the short tree with one, merged by log-sum-exp.

So the mask is as large as the tree, not as the context (arXiv 2508.08192, section on tree attention).
"""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.flash_attention import attend_masked, attend_pages
from pallas_kernels.keys import PagedKeys, TreeKeys
from pallas_kernels.merge import Partial, merge_attention


def tree_attention(
    q_BNKGh: Float[Array, "B N K G h"], tree: TreeKeys | None, prefix: PagedKeys, *, scale: float, apart: bool = False
) -> Partial:
    """Attention over the cached keys and over the tree's, merged."""
    cached = attend_pages(q_BNKGh, prefix, scale=scale, apart=apart)
    if tree is None:
        return cached
    return merge_attention([cached, attend_masked(q_BNKGh, tree.k_BSKh, tree.v_BSKh, tree.sees_BNS, scale=scale)])

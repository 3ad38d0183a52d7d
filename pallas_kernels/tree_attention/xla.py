"""Tree attention as XLA lowers it, on any device: the long prefix without a mask, the short tree with one, merged by log-sum-exp.

So the mask is as large as the tree, not as the context (arXiv 2508.08192, section on tree attention).
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.flash_attention import attend_masked, attend_pages
from pallas_kernels.keys import PagedKeys, TreeKeys
from pallas_kernels.merge import Partial, merge_attention


def tree_attention(
    q_BNKGh: Float[Array, "B N K G h"],
    tree: TreeKeys | None,
    prefix: PagedKeys,
    *,
    scale: float,
    apart: bool = False,
    dtype: Any = None,
) -> Partial:
    """Attention over the cached keys and over the tree's, merged."""
    out_BNKGh, lse_BNKG = attend_pages(q_BNKGh, prefix, scale=scale, apart=apart)
    if tree is not None:
        of_tree = attend_masked(q_BNKGh, tree.k_BSKh, tree.v_BSKh, tree.sees_BNS, scale=scale)
        out_BNKGh, lse_BNKG = merge_attention([(out_BNKGh, lse_BNKG), of_tree])
    return out_BNKGh if dtype is None else out_BNKGh.astype(dtype), lse_BNKG

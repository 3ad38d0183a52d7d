"""Exact attention over intervals of keys, returned with its log-sum-exp so that partial results merge.

A query attends the keys with index in [start, end): causal, chunk-local, prefix and padding masks are all intervals. Every op returns
the attention output and the log of the softmax denominator in float32 (float64 for float64 inputs); a query that sees no key gets
zeros and -inf, which change nothing when :func:`pallas_kernels.merge.merge_attention` merges them.
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.flash_attention import cpu, gpu, xla
from pallas_kernels.implementations import Chosen, first_supported
from pallas_kernels.keys import PagedKeys
from pallas_kernels.merge import Partial

__all__ = ["attend", "attend_masked", "attend_pages"]

PAGES = {"cpu": cpu.attend_pages, "gpu": gpu.attend_pages, "xla": xla.attend_pages}


def attend(
    q_BTKGh: Float[Array, "B T K G h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    start_BT: Int32[Array, "B T"],
    end_BT: Int32[Array, "B T"],
    *,
    scale: float,
) -> Partial:
    """Attention of each query over the keys in its interval; scores are multiplied by ``scale``."""
    return xla.attend(q_BTKGh, k_BSKh, v_BSKh, start_BT, end_BT, scale=scale)


def attend_masked(
    q_BTKGh: Float[Array, "B T K G h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    visible_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
) -> Partial:
    """Attention of each query over the keys that are visible to it, for the few masks that are not intervals: those of draft trees."""
    return xla.attend_masked(q_BTKGh, k_BSKh, v_BSKh, visible_BTS, scale=scale)


def attend_pages(
    q_BTKGh: Float[Array, "B T K G h"], cached: PagedKeys, *, scale: float, apart: bool = False, implementation: Chosen = None
) -> Partial:
    """Attention of each query over the keys of a paged cache that are in its interval.

    Reads the pages from the earliest start to the longest row's end and no others, however large the cache is. ``apart``: a row's result
    is the same to the last bit whatever the other rows are; that may take longer.
    """
    return first_supported("attend_pages", PAGES, implementation, q_BTKGh, cached, scale=scale, apart=apart)

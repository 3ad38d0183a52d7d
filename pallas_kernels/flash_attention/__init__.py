"""Exact attention over intervals of keys, returned with its log-sum-exp so that partial results merge.

A query attends the keys with index in [start, end): causal, chunk-local, prefix and padding masks are all intervals. Every op returns
the attention output and the log of the softmax denominator in float32 (float64 for float64 inputs); a query that sees no key gets
zeros and -inf, which change nothing when :func:`pallas_kernels.merge.merge_attention` merges them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.flash_attention import cpu, gpu, xla
from pallas_kernels.implementations import first_supported
from pallas_kernels.merge import Partial

__all__ = ["attend", "attend_masked", "attend_pages"]


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
    q_BTKGh: Float[Array, "B T K G h"],
    k_PKph: Float[Array, "P K p h"],
    v_PKph: Float[Array, "P K p h"],
    pages_BW: Int32[Array, "B W"],
    start_BT: Int32[Array, "B T"],
    end_BT: Int32[Array, "B T"],
    *,
    scale: float,
    apart: bool = False,
) -> Partial:
    """Attention over a paged cache: key ``s`` of row ``b`` is token ``s % p`` of page ``pages_BW[b, s // p]``.

    Reads the pages from the earliest start to the longest row's end and no others, however large the cache is. ``apart``: a row's result
    is the same to the last bit whatever the other rows are; that may take longer.
    """
    # On other devices it always is.
    implementations: list[Callable[..., Partial]] = [functools.partial(cpu.attend_pages, apart=apart), gpu.attend_pages, xla.attend_pages]
    return first_supported(implementations, q_BTKGh, k_PKph, v_PKph, pages_BW, start_BT, end_BT, scale=scale)

"""Exact attention over intervals of keys, returned with its log-sum-exp so that partial results merge.

A query attends the keys with index in [start, end): causal, chunk-local, prefix and padding masks are all intervals. Every op returns
the attention output and the log of the softmax denominator in float32 (float64 for float64 inputs); a query that sees no key gets
zeros and -inf, which change nothing when :func:`pallas_kernels.merge.merge_attention` merges them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.flash_attention import cpu, gpu, hopper, xla
from pallas_kernels.implementations import Implementation, first_supported, is_hopper
from pallas_kernels.keys import NewKeys, PagedKeys
from pallas_kernels.merge import Partial, merge_attention
from pallas_kernels.mosaic import DTYPES, HEAD_DIMS

__all__ = ["attend_masked", "attend_pages", "flash_attention", "keeps_no_scores"]

PAGES = {"cpu": cpu.attend_pages, "gpu": gpu.attend_pages, "xla": xla.attend_pages}


def flash_attention(
    q_BTKGh: Float[Array, "B T K G h"],
    new: NewKeys,
    cached: PagedKeys | None = None,
    *,
    scale: float,
    apart: bool = False,
    implementation: Implementation = None,
) -> Partial:
    """Attention of each query over the new keys, and the cached keys, that are in its intervals; scores are multiplied by ``scale``.

    Returns the output, [B, T, K, G, h], and the log-sum-exp of the scores, [B, T, K, G]. ``apart`` is as in :func:`attend_pages`,
    ``implementation`` as for :func:`pallas_kernels.implementations.first_supported`. Tokens that nobody sees must be finite in every page
    that a row's table names between the earliest start and the longest row's end.
    """
    return first_supported("flash_attention", IMPLEMENTATIONS, implementation, q_BTKGh, new, cached, scale=scale, apart=apart)


def keeps_no_scores(device_kind: str, dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether attention of a prompt keeps no scores in memory: so does the kernel for Hopper GPUs, if it supports the dtype and the head
    dimension. All other implementations have the whole matrix of a piece's scores there. ``device_kind``: as of ``jax.Device``.
    """
    return is_hopper(device_kind) and dtype.name in DTYPES and head_dim in HEAD_DIMS


def _in_parts(q_BTKGh: Array, new: NewKeys, cached: PagedKeys | None, *, scale: float, apart: bool = False) -> Partial:
    """As XLA lowers it: all scores of the new keys at once, cached keys some pages at a time, and a merge of the two."""
    of_new = xla.attend(q_BTKGh, new.k_BSKh, new.v_BSKh, new.interval.start_BT, new.interval.end_BT, scale=scale)
    return of_new if cached is None else merge_attention([attend_pages(q_BTKGh, cached, scale=scale, apart=apart), of_new])


IMPLEMENTATIONS = {"hopper": hopper.flash_attention, "xla": _in_parts}


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
    q_BTKGh: Float[Array, "B T K G h"], cached: PagedKeys, *, scale: float, apart: bool = False, implementation: Implementation = None
) -> Partial:
    """Attention of each query over the keys of a paged cache that are in its interval.

    Reads the pages from the earliest start to the longest row's end and no others, however large the cache is. ``apart``: a row's result
    is the same to the last bit whatever the other rows are; that may take longer. ``implementation``: as for
    :func:`pallas_kernels.implementations.first_supported`. Tokens that nobody sees must be finite in the pages that are read.
    """
    return first_supported("attend_pages", PAGES, implementation, q_BTKGh, cached, scale=scale, apart=apart)

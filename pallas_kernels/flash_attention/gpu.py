"""Attention over a paged KV cache on GPUs, for what the Hopper kernels do not take: many pages at a time."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.flash_attention import xla
from pallas_kernels.implementations import require_gpu
from pallas_kernels.keys import PagedKeys
from pallas_kernels.merge import Partial

_MOST_PAGES = 16
"""Pages of a row that are attended together. The last block is filled up with needless ones."""

_BLOCK_BYTES = 64 << 20
"""Most bytes of keys and values, and most bytes of scores, that a block takes."""


def attend_pages(
    q_BTKGh: Float[Array, "B T K G h"],
    cached: PagedKeys,
    *,
    scale: float,
    apart: bool = False,
) -> Partial:
    """A loop over blocks of pages that are copied into one matrix.

    Each turn of the loop starts about a dozen kernels, 13 µs on an H100 however little they compute
    (``benchmarks/results/h100-sxm-jax-0.11.2.json``: 839 µs for 64 pages of one row, one page a turn).
    """
    require_gpu()
    B, T, K, G, _ = q_BTKGh.shape
    _, _, p, h = cached.k_PKph.shape
    keys_bytes = 2 * B * K * p * h * cached.k_PKph.dtype.itemsize
    scores_bytes = 4 * B * T * K * G * p
    block = max(1, min(_MOST_PAGES, cached.pages_BW.shape[1], _BLOCK_BYTES // max(keys_bytes, scores_bytes)))
    return xla.attend_pages(q_BTKGh, cached, scale=scale, apart=apart, block=block)

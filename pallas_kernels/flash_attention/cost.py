"""What attention of many queries costs."""

from __future__ import annotations

import numpy as np

from pallas_kernels.cost import Cost
from pallas_kernels.flash_attention.hopper import KEYS
from pallas_kernels.mosaic import NOWHERE, ROWS

Bounds = tuple[np.ndarray, np.ndarray]
"""Each query's start and end, [B, T]: it sees the keys in [start, end)."""


def scores(bounds: Bounds) -> int:
    """Scores of a query head that are not masked, in all sequences."""
    start_BT, end_BT = bounds
    return int(np.sum(np.maximum(end_BT - start_BT, 0), dtype=np.int64))


def computed_scores(bounds: Bounds) -> int:
    """Scores of a query head that the Hopper kernel computes, in all sequences: a block of queries meets all blocks of keys from the first
    to the last that any of its queries sees.
    """
    return int(np.sum(_key_blocks(*bounds), dtype=np.int64)) * KEYS * _block(bounds[0].shape[1])


def flash_attention_cost(K: int, G: int, h: int, new: Bounds, cached: Bounds | None = None) -> Cost:
    """The cost of a call, in bfloat16 or float16; copies are those of the Hopper kernel. K, G, h: KV heads, query heads of each, head
    dimension.
    """
    B, T = new[0].shape
    bounds = [new] if cached is None else [new, cached]
    queries = B * T * K * G
    seen = sum(int(np.sum(np.maximum(end_B - start_B, 0))) for start_B, end_B in (_range(*each) for each in bounds))
    needed = 2 * seen * K * h * 2 + queries * h * 2
    results = queries * (h + 1) * 4
    block = _block(T)
    rows = B * -(-T // block) * block * K * G
    keys = sum(int(np.sum(_key_blocks(*each), dtype=np.int64)) for each in bounds) * KEYS * 2 * h * 2 * K * G
    copied = rows * (h * 2 + len(bounds) * 2 * 4 + (h + 1) * 4) + keys
    return Cost(4 * K * G * h * sum(map(scores, bounds)), needed + results, copied)


def _block(T: int) -> int:
    """Queries of a thread block."""
    return ROWS if T <= ROWS else 2 * ROWS


def _range(start_BT: np.ndarray, end_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest [start, end) with every key that any query of the last axis sees; start is past end if none sees any."""
    some_BT = start_BT < end_BT
    return np.min(start_BT, axis=-1, where=some_BT, initial=NOWHERE), np.max(end_BT, axis=-1, where=some_BT, initial=0)


def _key_blocks(start_BT: np.ndarray, end_BT: np.ndarray) -> np.ndarray:
    """Blocks of keys that each block of queries meets, [B, blocks]."""
    block = _block(start_BT.shape[1])
    start_Bbt, end_Bbt = (np.pad(a, ((0, 0), (0, -a.shape[1] % block))).reshape(len(a), -1, block) for a in (start_BT, end_BT))
    start_Bb, end_Bb = _range(start_Bbt, end_Bbt)
    return np.maximum(-(-end_Bb // KEYS) - start_Bb // KEYS, 0)

"""What tree attention costs."""

from __future__ import annotations

import numpy as np

from pallas_kernels.cost import Cost
from pallas_kernels.merge.cost import merge_splits_cost
from pallas_kernels.merge.hopper import HEAD_DIM
from pallas_kernels.mosaic import ROWS
from pallas_kernels.tree_attention.hopper import KEYS, Tiling


def tree_attention_cost(K: int, G: int, h: int, S: int, start_BN: np.ndarray, end_BN: np.ndarray, seen: int, slots: int) -> Cost:
    """The cost of a call, in bfloat16 or float16; copies are those of the Hopper kernels.

    Nodes see the cached keys in [start, end); ``seen``: pairs of a node and one of the tree's S keys that it sees, in all sequences;
    ``slots``: tokens of a page table. K, G, h: KV heads, query heads of each, head dimension.
    """
    (B, N), key_bytes = start_BN.shape, 2 * K * h * 2
    some_BN = start_BN < end_BN
    first_B = np.min(start_BN, axis=1, where=some_BN, initial=slots)
    last_B = np.max(end_BN, axis=1, where=some_BN, initial=0)
    scores = int(np.sum(np.maximum(end_BN - start_BN, 0))) + seen
    results = B * K * N * G * (h + 1) * 4
    needed = int(np.sum(np.maximum(last_B - first_B, 0))) * key_bytes + B * S * key_bytes + B * K * N * G * h * 2
    tiling = Tiling.of(B, K, N * G, S, slots, h)
    blocks_B = np.maximum(-(-last_B // KEYS) - first_B // KEYS, 0)
    cached = int(np.sum(blocks_B)) * KEYS * key_bytes * tiling.groups
    tree = B * tiling.tree_keys * key_bytes * tiling.groups
    rows = B * K * tiling.splits * (N * G * h * 2 + tiling.rows * (h + 1) * 4)
    numbers = B * K * tiling.splits * tiling.groups * tiling.warpgroups * ROWS * 4 * (4 if S else 2)
    merged = merge_splits_cost(B, K, tiling.splits, N * G, h, 4).copied_bytes if h == HEAD_DIM else 0
    return Cost(4 * K * G * h * scores, needed + results, cached + tree + rows + numbers + merged)

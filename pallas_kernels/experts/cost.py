"""What experts cost."""

from __future__ import annotations

import numpy as np

from pallas_kernels.cost import Cost
from pallas_kernels.experts import few_rows, many_rows
from pallas_kernels.mosaic import ROWS


def experts_cost(expert_M: np.ndarray, E: int, D: int, F: int, *, shared: bool) -> Cost:
    """The cost of a call, in bfloat16 or float16; ``expert_M``: each row's expert. Copies are those of the Hopper kernels.

    For many rows the copies leave out the shared block, which XLA multiplies, and sorting.
    """
    M, size_E = len(expert_M), np.bincount(expert_M[(expert_M >= 0) & (expert_M < E)], minlength=E)
    blocks, rows = int(np.count_nonzero(size_E)) + shared, int(size_E.sum()) + shared * M
    copied = _few(M, E, D, F, size_E, shared) if M <= few_rows.MOST_ROWS else _many(D, F, size_E)
    return Cost(6 * rows * D * F, 2 * (3 * blocks * D * F + 2 * M * D), copied)


def _few(M: int, E: int, D: int, F: int, size_E: np.ndarray, shared: bool) -> int:
    blocks, results = int(np.count_nonzero(size_E)) + shared, int(size_E.sum()) + shared * M
    copied = 0
    for tiling, gated in zip(few_rows.tilings(M, E, D, F), (True, False), strict=True):
        tiles = tiling.outputs // few_rows.OUTPUTS
        copied += blocks * tiles * tiling.inputs * (M + 2 * few_rows.OUTPUTS) * 2
        copied += results * tiling.outputs * (2 if gated and tiling.splits == 1 else 2 * 4 * tiling.splits)
    return copied


def _many(D: int, F: int, size_E: np.ndarray) -> int:
    blocks, stored = int(np.sum(-(-size_E // many_rows.BLOCK))), int(np.sum(-(-size_E // 8) * 8))
    copied = 0
    for outputs, inputs, results in ((F, D, F), (D // 2, F, D)):
        tiles = outputs // many_rows.OUTPUTS
        copied += blocks * tiles * inputs * (2 * ROWS + 2 * many_rows.OUTPUTS) * 2 + stored * results * 2
    return copied

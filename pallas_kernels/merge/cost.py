"""What merging the splits of tree attention costs."""

from __future__ import annotations

from pallas_kernels.cost import Cost
from pallas_kernels.merge.hopper import shared_bytes


def merge_splits_cost(B: int, K: int, splits: int, rows: int, h: int, itemsize: int) -> Cost:
    """The cost of merging ``rows`` query rows of each KV head and sequence; ``itemsize``: bytes of a number of the output.

    Copies are those of the Hopper kernel: each of its thread blocks copies the log-sum-exps of eight rows.
    """
    merged = B * K * rows
    return Cost(2 * merged * splits * h, merged * (splits * (h + 1) * 4 + h * itemsize), merged * shared_bytes(splits, h))

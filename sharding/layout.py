"""Which rank computes which positions of a sequence.

A layout is an int32 array [ranks, slots] of positions, ascending in each rank, then :data:`EMPTY`. With causal attention late tokens
cost more than early ones. So a sequence is cut into 2N parts and rank i takes parts i and 2N-1-i: all ranks do the same work (arXiv
2411.01783, section 3.4).
"""

from __future__ import annotations

import itertools

import numpy as np

EMPTY = -1
"""The position of a slot that holds no token."""


def balanced(length: int, ranks: int, *, first: int = 0, block: int = 1, last_on: int | None = None) -> np.ndarray:
    """Spread the positions ``first`` to ``first + length - 1`` over the ranks in balanced parts; [ranks, most that a rank gets].

    Parts end at absolute positions that are multiples of ``block``: with Llama 4's attention chunk as the block, no chunk is split
    between two ranks. Any length works; a rank may get no tokens. With ``block`` 1 no rank gets more than ceil(length / ranks). If
    ``last_on`` is given, the last position is on that rank. Raises ValueError for numbers out of range.
    """
    if length < 0 or ranks < 1 or first < 0 or block < 1:
        raise ValueError(
            f"length {length}, ranks {ranks}, first {first}, block {block}; expected no negative number, and no zero but length"
        )
    first_block, end_block = first // block, -(-(first + length) // block)
    blocks = np.array([(end_block - first_block + ranks - 1 - rank) // ranks for rank in range(ranks)])
    if last_on is not None and not 0 <= last_on < ranks:
        raise ValueError(f"last_on is {last_on}; expected a rank, 0 to {ranks - 1}")
    early, late = blocks // 2, blocks - blocks // 2
    cuts = first_block + np.cumsum([0, *early, *late[::-1]])
    edges = np.clip(cuts * block, first, first + length)
    parts = [np.arange(low, high) for low, high in itertools.pairwise(edges)]
    rows = [np.concatenate([parts[rank], parts[2 * ranks - 1 - rank]]) for rank in range(ranks)]
    if last_on is not None and length > 0:
        holder = next(rank for rank, row in enumerate(rows) if len(row) and row[-1] == first + length - 1)
        rows = [rows[(rank + holder - last_on) % ranks] for rank in range(ranks)]
    return padded(rows)


def padded(rows: list[np.ndarray], slots: int = 0) -> np.ndarray:
    """Stack rows of positions as one array, padded with :data:`EMPTY` to the longest row or to ``slots``."""
    slots = max([slots, *(len(row) for row in rows)])
    return np.stack([np.pad(row, (0, slots - len(row)), constant_values=EMPTY) for row in rows]).astype(np.int32)


def batch(layouts: list[np.ndarray], slots: int = 0) -> np.ndarray:
    """Stack the layouts of several sequences as [ranks, sequences, slots], with at least ``slots`` slots."""
    slots = max([slots, *(layout.shape[1] for layout in layouts)])
    return np.stack([padded(list(layout), slots) for layout in layouts], axis=1)

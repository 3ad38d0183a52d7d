"""Keeps the target's states in memory, so that later epochs do not compute them again: with a small drafter they are most of the work."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from l4jax.parallel.arrays import to_host
from l4jax.training.batches import Rows
from l4jax.training.losses import TargetStates


class KeptStates:
    """The target's states of each row, computed once and kept in the host's memory by the row's number.

    Each token takes (1 + features) states of the target's width and dtype: 4.6 kB for three features of width 576 in bfloat16.
    """

    def __init__(self, compute: Callable[[Rows], TargetStates]) -> None:
        self._compute = compute
        self._kept: dict[int, TargetStates] = {}

    def __call__(self, rows: Rows) -> TargetStates:
        """The states of a batch."""
        numbers = np.asarray(rows.number_B).tolist()
        if any(number not in self._kept for number in numbers):
            states = jax.tree.map(to_host, self._compute(rows))
            for index, number in enumerate(numbers):
                # Copied, because a view would keep the whole batch alive.
                self._kept[number] = jax.tree.map(lambda leaf, index=index: leaf[index].copy(), states)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(self._kept[number] for number in numbers))

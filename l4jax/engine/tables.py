"""Each slot's page tables, kept as arrays to which a sequence's new pages are added."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from l4jax.cache import PageTables
from l4jax.engine.step import BurstRow, PieceRow, Table
from l4jax.parallel.arrays import host_array

Row = PieceRow | BurstRow | None


class _Kind:
    """The tables of one kind of page: for each slot its last table, and the same as a row of an array, padded with its last page."""

    def __init__(self, slots: int, width: int) -> None:
        self._known: list[Table] = [()] * slots
        self._pages_UW = np.zeros((slots, width), np.int32)

    def rows(self, numbered: list[tuple[int, int, Table]], rows: int) -> np.ndarray:
        """The tables of a program's ``rows`` rows, given (row, slot, table) of each; padding rows list page 0."""
        pages_BW = np.zeros((rows, self._pages_UW.shape[1]), np.int32)
        for row, slot, table in numbered:
            self._write(slot, table)
            pages_BW[row] = self._pages_UW[slot]
        return pages_BW

    def _write(self, slot: int, table: Table) -> None:
        known = self._known[slot]
        if table == known or not table:
            return
        same = min(len(known), len(table))
        if table[:same] != known[:same]:
            same = 0
        pages_W = self._pages_UW[slot]
        pages_W[same : len(table)] = table[same:]
        pages_W[len(table) :] = table[-1]
        self._known[slot] = table


class SlotTables:
    """The page tables of all slots. A step's tables are copied out, because programs may read their inputs later.

    ``rows_apart``: as in :class:`PageTables`.
    """

    def __init__(self, slots: int, full_width: int, local_width: int, *, rows_apart: bool) -> None:
        self._rows_apart = rows_apart
        self._full, self._local = _Kind(slots, full_width), _Kind(slots, local_width)

    def of(self, rows: Iterable[Row]) -> PageTables:
        """The tables of these rows."""
        listed = list(rows)
        full = [(i, row.slot, row.full) for i, row in enumerate(listed) if row is not None]
        local = [(i, row.slot, row.local) for i, row in enumerate(listed) if row is not None]
        full_BW, local_Bw = self._full.rows(full, len(listed)), self._local.rows(local, len(listed))
        return PageTables(host_array(full_BW, np.int32), host_array(local_Bw, np.int32), self._rows_apart)

"""Each slot's page tables are those of its last row, padded with the row's own last page."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from l4jax.engine.step import BurstRow, Table
from l4jax.engine.tables import SlotTables
from tests.engine.fake import padded

SLOTS, FULL, LOCAL = 3, 5, 2


def row(slot: int, full: Table, local: Table) -> BurstRow:
    return BurstRow(request=slot, slot=slot, limit=1, full=full, local=local)


def tables(most: int) -> st.SearchStrategy[Table]:
    """Of few pages, so that a slot's next table often begins as the last one did, or is the same."""
    return st.lists(st.integers(0, 2), min_size=1, max_size=most).map(tuple)


steps = st.lists(
    st.lists(st.builds(row, st.integers(0, SLOTS - 1), tables(FULL), tables(LOCAL)) | st.none(), min_size=1, max_size=3), max_size=12
)


@given(steps)
def test_a_rows_table_is_its_own_whatever_its_slot_had_before(steps: list[list[BurstRow | None]]) -> None:
    kept, given_out = SlotTables(SLOTS, FULL, LOCAL, rows_apart=False), []
    for rows in steps:
        found = kept.of(rows)
        full = [(0,) * FULL if row is None else padded(row.full, FULL) for row in rows]
        local = [(0,) * LOCAL if row is None else padded(row.local, LOCAL) for row in rows]
        given_out.append((found, full, local))
    # All at the end: a program may read its inputs after later steps were made.
    for found, full, local in given_out:
        np.testing.assert_array_equal(found.full_BW, full)
        np.testing.assert_array_equal(found.local_Bw, local)


def test_without_chunks_no_local_page_is_named() -> None:
    found = SlotTables(2, 3, 1, rows_apart=False).of([row(1, (4, 2), ()), None])
    np.testing.assert_array_equal(found.full_BW, [[4, 2, 2], [0, 0, 0]])
    np.testing.assert_array_equal(found.local_Bw, [[0], [0]])

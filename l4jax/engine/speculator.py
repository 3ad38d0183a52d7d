"""A drafter, and the table that says how to speculate with it, as the runner and the scheduler need it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from l4jax.decoding.plan import Speculation, SpeculationTable
from l4jax.decoding.speculate import BeyondTraining
from l4jax.engine.step import Plan
from l4jax.parallel.placement import DrafterPlacement


@dataclasses.dataclass(frozen=True)
class Speculator:
    """A drafter on its target's mesh, how to speculate with it, and what it does beyond its trained length.

    ``asked_for``: the user has said how to speculate, so a prompt that cannot be speculated for is an error.
    """

    placement: DrafterPlacement
    weights: Mapping[str, jax.Array]
    table: SpeculationTable
    beyond: BeyondTraining
    asked_for: bool

    def pinned(self, rows: int) -> Speculator | None:
        """The same drafter with one plan for any number of rows, its table's for this number; None if that is not to speculate."""
        speculation = self.table.at(rows)
        return None if speculation is None else dataclasses.replace(self, table=SpeculationTable.always(speculation))

    def plans(self) -> tuple[dict[Plan, Speculation], tuple[tuple[int, Plan | None], ...]]:
        """The speculation that each of the scheduler's plans stands for, and the scheduler's table of plans."""
        trees: dict[Plan, Speculation] = {}
        entries: list[tuple[int, Plan | None]] = []
        for rows, speculation in self.table.entries:
            plan = None if speculation is None else Plan(f"{rows} rows", speculation.tree.depth)
            if plan is not None and speculation is not None:
                trees[plan] = speculation
            entries.append((rows, plan))
        return trees, tuple(entries)

"""The items in order of worth, and the worker that runs each. Imports no JAX: the supervising process reads it too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.h100.sizes import Sizes

OPS = ("tree_attention", "flash_attention", "matmul", "experts", "merge")
"""Ops of ``pallas_kernels`` in the order in which they are timed; ``pallas_kernels.shapes`` has their shapes."""
KERNELS = ("tree_attention", "merge_splits", "flash_attention", "experts", "write_heads", "add_norm")
"""Ops with kernels of our own, which are compared with XLA's. The last two are not timed: starting them takes as long as they do."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One measurement: ``benchmarks.h100.{module}.measure(bench, record, **arguments)``.

    ``process``: consecutive items with the same name here share a worker, and with it the model's weights. PyTorch has its own
    worker because JAX keeps the device's memory, and ``uncached`` because XLA does not dump a program that comes from a cache.
    ``packages``: those that are measured beside ours, whose versions are kept with the item.
    """

    name: str
    module: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    process: str = "jax"
    packages: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """The name up to the slash, by which ``--only`` and ``--skip`` take all items of a group."""
        return self.name.split("/")[0]


def items(sizes: Sizes) -> list[Item]:
    """All items at these sizes."""
    first, *others = sizes.speculated_rows
    return [
        Item("ceilings", "ceilings"),
        Item("correctness/llama", "correctness", {"family": "llama"}),
        *(Item(f"kernels/{op}", "kernels", {"op": op}) for op in KERNELS),
        *(Item(f"decode/{rows}", "generation", {"part": "decode", "rows": rows}) for rows in sizes.rows),
        *_speculation(first),
        *(Item(f"prefill/{piece}", "generation", {"part": "prefill", "piece": piece}) for piece in sizes.pieces),
        *(Item(f"ops/{op}", "ops", {"op": op}) for op in OPS),
        Item("correctness/llama4", "correctness", {"family": "llama4"}),
        *(item for rows in others for item in _speculation(rows)),
        *(Item(f"tokamax/{op}", "rivals_tokamax", {"op": op}, packages=("tokamax",)) for op in ("flash_attention", "experts")),
        *(Item(f"torch/{op}", "rivals_torch", {"op": op}, "torch", ("torch",)) for op in OPS if op != "merge"),
        Item("transformers/decode", "rivals_transformers", {}, "torch", ("torch", "transformers")),
        Item("launches", "launches", {}, "uncached"),
    ]


def _speculation(rows: int) -> list[Item]:
    plans = {"chain3": "chain:3", "eagle26": "tree:eagle26"}
    return [Item(f"{name}/{rows}", "generation", {"part": "speculate", "rows": rows, "plan": plan}) for name, plan in plans.items()]


def selected(plan: list[Item], only: list[str], skip: list[str]) -> list[Item]:
    """The items that ``only`` names (all if it is empty), without those that ``skip`` names. Raises ValueError for unknown names."""
    known = {item.name for item in plan} | {item.group for item in plan}
    for name in (*only, *skip):
        if name not in known:
            raise ValueError(f"{name!r} is not an item; expected {', '.join(sorted(known))}")

    def named(item: Item, names: list[str]) -> bool:
        return item.name in names or item.group in names

    return [item for item in plan if (not only or named(item, only)) and not named(item, skip)]

"""How to speculate: the tree, how its tokens are drafted, and how a user writes both."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from l4jax.config import ModelConfig
from l4jax.data import configs_path
from l4jax.decoding.tree import DynamicTree, StaticTree
from sharding.kinds import shown
from sharding.words import counted


@dataclasses.dataclass(frozen=True)
class Speculation:
    """A tree, and whether its tokens are drawn from the drafter's distribution (``sampled``) or are its likeliest ones."""

    tree: StaticTree | DynamicTree
    sampled: bool = False

    def __post_init__(self) -> None:
        if self.sampled and isinstance(self.tree, DynamicTree):
            raise ValueError(
                "speculation with a dynamic tree cannot be sampled: its nodes are chosen by their probability after they are drawn, and "
                "the chosen ones no longer have the distribution that verification relies on; expected a chain or a static tree"
            )

    def __str__(self) -> str:
        return f"{self.tree}{',sampled' if self.sampled else ''}"

    @classmethod
    def parse(cls, text: str) -> Speculation | None:
        """Read "chain:5", "tree:eagle26" (of ``configs/trees``, or a .json file) or "dynamic:steps=5,topk=4,nodes=16"; None for "off".

        A chain or tree may end in ",sampled".
        """
        kind, _, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
        sampled = rest.endswith(",sampled")
        rest = rest.removesuffix(",sampled")
        if isinstance(text, str) and text == "off":  # an array is compared item by item
            return None
        if kind == "chain" and re.fullmatch(r"[1-9][0-9]{0,2}", rest):
            return cls(StaticTree.chain(int(rest)), sampled)
        if kind == "tree" and rest:
            path = Path(rest) if rest.endswith(".json") else configs_path() / "trees" / f"{rest}.json"
            return cls(dataclasses.replace(StaticTree.from_file(path), name=rest), sampled)
        sizes = [re.fullmatch("(steps|topk|nodes)=([0-9]{1,6})", part) for part in rest.split(",")]
        by_name = {size[1]: int(size[2]) for size in sizes if size is not None}
        if kind == "dynamic" and len(sizes) == len(by_name) == 3:
            return cls(DynamicTree(**by_name), sampled)
        raise ValueError(
            f'speculation is {shown(text)}; expected "auto", "off", "chain:5", "tree:eagle26" (or a .json file of paths) or '
            '"dynamic:steps=5,topk=4,nodes=16"; chains and trees may end in ",sampled"'
        )


TableJson = Mapping[str, Mapping[str, str]]
"""How to speculate, by dtype and then by number of rows, as in ``{"bfloat16": {"1": "chain:5", "8": "off"}}``; off for other dtypes.

The dtype decides how much more a pass over several tokens costs than a pass over one: on a CPU little in bfloat16, much in float32.
"""
UNMEASURED: TableJson = {dtype: {"1": "chain:3"} for dtype in ("float32", "bfloat16", "float16")}
"""The table of a drafter whose speed has not been measured."""


@dataclasses.dataclass(frozen=True)
class SpeculationTable:
    """How to speculate at each batch size: (rows, speculation), ordered by rows; None where decoding one token per pass is faster.

    An entry applies from its number of rows up to the next entry's; the first applies below it too.
    """

    entries: tuple[tuple[int, Speculation | None], ...]

    @classmethod
    def always(cls, speculation: Speculation | None) -> SpeculationTable:
        """The same at every batch size."""
        return cls(((1, speculation),))

    @classmethod
    def from_json(cls, values: TableJson, dtype: str) -> SpeculationTable:
        """The table for this dtype. Raises ValueError if ``values`` is not a speculation table."""
        example = '{"bfloat16": {"1": "chain:5", "8": "off"}}'
        by_dtype = {}
        for name, by_rows in values.items():
            if name not in UNMEASURED or not isinstance(by_rows, Mapping) or not by_rows:
                raise ValueError(
                    f"the speculation table has {shown(name)}: {shown(by_rows)}; expected dtypes and numbers of rows, as in {example}"
                )
            entries = {}
            for rows, text in by_rows.items():
                if not re.fullmatch("[1-9][0-9]{0,6}", rows) or not isinstance(text, str):
                    raise ValueError(f"the speculation table has {shown(rows)}: {shown(text)}; expected numbers of rows, as in {example}")
                entries[int(rows)] = Speculation.parse(text)
            by_dtype[name] = cls(tuple(sorted(entries.items(), key=lambda entry: entry[0])))
        return by_dtype.get(dtype, cls.always(None))

    @property
    def speculates(self) -> bool:
        """Whether any batch size speculates."""
        return any(speculation is not None for _, speculation in self.entries)

    def check_fits(self, config: ModelConfig, draft_vocab_size: int) -> None:
        """Raise ValueError if a tree is deeper than the cache allows, or a node has more children than the draft vocabulary has tokens."""
        most = min(config.max_position_embeddings, config.attention_chunk_size or config.max_position_embeddings) - 1
        for _, speculation in self.entries:
            if speculation is not None and speculation.tree.depth > most:
                depth, size = speculation.tree.depth, speculation.tree.size
                raise ValueError(
                    f"a draft tree of {counted(size, 'node')} is {counted(depth, 'level')} deep, too large for the cache; "
                    f"expected at most {counted(most, 'level')}, "
                    "one less than the model's context and attention chunk"
                )
            if speculation is not None and speculation.tree.most_children > draft_vocab_size:
                raise ValueError(
                    f"a draft tree has nodes with {speculation.tree.most_children} children; expected at most {draft_vocab_size}, the size "
                    "of the draft vocabulary"
                )

    def at(self, rows: int) -> Speculation | None:
        """How to speculate with this number of rows."""
        fitting = [speculation for least, speculation in self.entries if least <= rows]
        return fitting[-1] if fitting else self.entries[0][1]

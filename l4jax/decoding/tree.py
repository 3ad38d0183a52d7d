"""Draft trees: their shapes, known when a program is compiled, and the tables that verification and attention read.

Node 0 is the root, the last token emitted; the others are drafted. A node's parent always has a lower number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from l4jax.files import parse_json
from sharding.kinds import is_whole

NONE = -1
"""Stands for a node that does not exist."""


@dataclasses.dataclass(frozen=True)
class StaticTree:
    """A tree whose shape is the same for every row and round; ``parents[n]`` is node n's parent, NONE for the root.

    Nodes are ordered by depth, and siblings are adjacent, in order of rank: a node's first child is the drafter's likeliest token (or the
    first one drawn). ``name``: what a user has called it, as in "tree:eagle26"; trees are the same whatever their names.
    """

    parents: tuple[int, ...]
    name: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.parents or self.parents[0] != NONE or any(not 0 <= p < n for n, p in enumerate(self.parents) if n > 0):
            raise ValueError(f"a tree's parents are {self.parents}; expected {NONE} for the root and a lower number for every other node")
        depths = self.depths
        if list(depths) != sorted(depths) or list(self.parents) != sorted(self.parents):
            raise ValueError(f"a tree's parents are {self.parents}; expected nodes ordered by depth, siblings together")

    def __str__(self) -> str:
        drafts = len(self.parents) - 1
        if self == self.chain(drafts):
            return f"chain:{drafts}"
        return f"tree:{self.name}" if self.name else f"tree with parents {', '.join(map(str, self.parents[1:]))}"

    @classmethod
    def chain(cls, length: int) -> StaticTree:
        """Make a chain of ``length`` drafted tokens."""
        return cls(tuple(range(NONE, length)))

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> StaticTree:
        """Build a tree from the path to each node but the root: ``[1, 0]`` is the first child of the root's second child.

        Raises ValueError if a path is empty, given twice or not made of ranks, or if its parent or its next better sibling is missing.
        """
        for path in paths:
            if not path or any(not is_whole(rank) or rank < 0 for rank in path):
                raise ValueError(f"tree path {list(path)} is out of range; expected at least one rank, each a whole number of 0 or more")
        ordered = sorted(map(tuple, paths), key=lambda path: (len(path), path))
        number = {(): 0} | {path: n for n, path in enumerate(ordered, start=1)}
        if len(number) <= len(ordered):
            twice = next(path for n, path in enumerate(ordered) if path in ordered[:n])
            raise ValueError(f"tree path {list(twice)} is given twice; expected each path once")
        for path in ordered:
            if path[:-1] not in number:
                raise ValueError(f"tree path {list(path)} is an orphan; expected its parent {list(path[:-1])} in the tree")
            if path[-1] > 0 and (*path[:-1], path[-1] - 1) not in number:
                raise ValueError(
                    f"tree path {list(path)} is out of range; expected its better sibling {[*path[:-1], path[-1] - 1]} in the tree"
                )
        return cls((NONE, *(number[path[:-1]] for path in ordered)))

    @classmethod
    def from_file(cls, path: Path) -> StaticTree:
        """Read a JSON list of paths, as in ``configs/trees/``. Raises ValueError, naming the file, if it holds no tree."""
        try:
            paths = parse_json(path.read_bytes(), f"tree file {path}", "expected JSON such as [[0], [1], [0, 0]]")
        except FileNotFoundError as error:
            raise ValueError(f"tree file {path} does not exist; expected JSON such as [[0], [1], [0, 0]]") from error
        except OSError as error:
            raise ValueError(f"tree file {path} cannot be read ({error.strerror}); expected JSON such as [[0], [1], [0, 0]]") from error
        if not isinstance(paths, list) or not paths or not all(isinstance(p, list) for p in paths):
            raise ValueError(f"tree file {path} holds no list of paths; expected JSON such as [[0], [1], [0, 0]]")
        try:
            return cls.from_paths(paths)
        except ValueError as error:
            raise ValueError(f"tree file {path}: {error}") from error

    @property
    def size(self) -> int:
        """Nodes, the root included."""
        return len(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        """Each node's distance from the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent == NONE else depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """The length of the longest path, the root not counted."""
        return max(self.depths)

    @property
    def most_children(self) -> int:
        """The most children that a node has."""
        return max(len(self.children(node)) for node in range(self.size))

    def children(self, node: int) -> tuple[int, ...]:
        """A node's children, best first."""
        return tuple(n for n, parent in enumerate(self.parents) if parent == node)


@dataclasses.dataclass(frozen=True)
class DynamicTree:
    """A tree that is grown anew in every round (EAGLE-2, arXiv 2406.16858): expanded, then cut to the likeliest nodes.

    In each of ``steps`` expansions the ``topk`` likeliest leaves get their ``topk`` likeliest children. Then the root and the
    ``nodes`` - 1 likeliest nodes are kept. The tree has at most ``steps`` levels, and exactly ``nodes`` nodes.
    """

    steps: int
    topk: int
    nodes: int

    def __post_init__(self) -> None:
        for name in ("steps", "topk"):
            if getattr(self, name) < 1:
                raise ValueError(f"a dynamic tree has {name}={getattr(self, name)}; expected at least 1")
        most = 1 + self.topk + (self.steps - 1) * self.topk**2
        if not 2 <= self.nodes <= most:
            drafted = f"what steps={self.steps} and topk={self.topk} can draft"
            raise ValueError(f"a dynamic tree has nodes={self.nodes}; expected 2 to {most}, which is {drafted}")

    def __str__(self) -> str:
        return f"dynamic:steps={self.steps},topk={self.topk},nodes={self.nodes}"

    @property
    def size(self) -> int:
        """Nodes, the root included."""
        return self.nodes

    @property
    def depth(self) -> int:
        """The length of the longest path, the root not counted."""
        return min(self.steps, self.nodes - 1)

    @property
    def most_children(self) -> int:
        """The most children that a node has."""
        return self.topk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TreeTables:
    """The trees of a batch, one per row, as tables; NONE where a node does not exist.

    ``sees_BNN[b, n, m]``: node m is n or an ancestor of it. ``first_child_BN``, ``next_sibling_BN``: children in order of number.
    """

    parent_BN: Int32[Array, "B N"]
    depth_BN: Int32[Array, "B N"]
    sees_BNN: Bool[Array, "B N N"]
    first_child_BN: Int32[Array, "B N"]
    next_sibling_BN: Int32[Array, "B N"]


def tree_tables(parent_BN: Int32[Array, "B N"], depth: int) -> TreeTables:
    """Make the tables of trees of at most this depth."""
    B, N = parent_BN.shape
    node_N = jnp.arange(N, dtype=jnp.int32)
    itself_BNN = jnp.broadcast_to(node_N[:, None] == node_N[None, :], (B, N, N))
    sees_BNN = itself_BNN
    for _ in range(depth):  # each pass adds what the parent sees, one level further up
        parents_BNN = jnp.take_along_axis(sees_BNN, jnp.maximum(parent_BN, 0)[:, :, None], axis=1)
        sees_BNN = itself_BNN | (parents_BNN & (parent_BN != NONE)[:, :, None])
    is_child_BNN = parent_BN[:, None, :] == node_N[None, :, None]
    is_later_sibling_BNN = (parent_BN[:, :, None] == parent_BN[:, None, :]) & (node_N[None, :] > node_N[:, None])[None]
    return TreeTables(
        parent_BN=parent_BN,
        depth_BN=jnp.sum(sees_BNN, axis=-1, dtype=jnp.int32) - 1,
        sees_BNN=sees_BNN,
        first_child_BN=_first(is_child_BNN),
        next_sibling_BN=_first(is_later_sibling_BNN),
    )


def _first(mask_BNN: Bool[Array, "B N N"]) -> Int32[Array, "B N"]:
    """The lowest node marked in each row of the mask; NONE if none is."""
    return jnp.where(jnp.any(mask_BNN, axis=-1), jnp.argmax(mask_BNN, axis=-1).astype(jnp.int32), NONE)

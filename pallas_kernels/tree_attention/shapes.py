"""Shapes of real models on real meshes: tests compile the kernels for them, and the H100 benchmark times them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """B rows of N nodes over S cached tokens, of K KV heads with G query heads each, and h numbers a head."""

    name: str
    B: int
    N: int
    S: int
    K: int = 8
    G: int = 4
    h: int = 128


EAGLE26 = 26
"""Nodes of the tree ``eagle26``, the root included."""

SHAPES = [
    Shape("8B decode, 1 row, 1K", 1, 1, 1024),
    Shape("8B decode, 1 row, 8K", 1, 1, 8192),
    Shape("8B decode, 32 rows, 8K", 32, 1, 8192),
    Shape("8B decode, 128 rows, 8K", 128, 1, 8192),
    Shape("8B chain of 3, 8 rows, 8K", 8, 4, 8192),
    Shape("8B eagle26, 1 row, 8K", 1, EAGLE26, 8192),
    Shape("70B decode on tensor=8, 1 row, 8K", 1, 1, 8192, K=1, G=8),
    Shape("70B decode on tensor=8, 8 rows, 8K", 8, 1, 8192, K=1, G=8),
    Shape("70B eagle26 on tensor=8, 1 row, 8K", 1, EAGLE26, 8192, K=1, G=8),
    Shape("405B decode on tensor=16, 32 rows, 8K", 32, 1, 8192, K=1, G=16),
    Shape("Scout decode on tensor=8, 32 rows, 8K", 32, 1, 8192, K=1, G=5),
    Shape("Scout eagle26 on tensor=8, 8 rows, 8K", 8, EAGLE26, 8192, K=1, G=5),
    Shape("Scout 64 nodes on tensor=8, 1 row, 128K", 1, 64, 131072, K=1, G=5),
    Shape("SmolLM2 decode, 8 rows, 2K", 8, 1, 2048, K=3, G=3, h=64),
    Shape("SmolLM2 64 nodes, 1 row, 2K", 1, 64, 2048, K=3, G=3, h=64),
]

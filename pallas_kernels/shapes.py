"""Shapes of real models on real meshes: kernels are compiled for them in tests, and timed at them on an H100. Imports no JAX."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Attention:
    """B rows of T queries over S keys; K KV heads of G query heads each, head dimension h.

    In flash attention the queries are the last T of the S tokens. In tree attention they are T nodes after S cached tokens, or, if there is
    one, the last of the S.
    """

    label: str
    B: int
    T: int
    S: int
    K: int = 8
    G: int = 4
    h: int = 128

    @property
    def nbytes(self) -> int:
        """Keys, values, queries and outputs in bfloat16, each moved once."""
        return 2 * self.B * self.K * self.h * (2 * self.S + 2 * self.T * self.G)

    def flops(self, scores: int) -> int:
        """FLOPs of ``scores`` scores a row and head, and of their product with the values."""
        return 4 * self.B * self.K * self.G * self.h * scores


@dataclasses.dataclass(frozen=True)
class Mixture:
    """M rows of width D through E experts of width F. Bytes and FLOPs are those without a shared expert."""

    label: str
    M: int
    E: int
    D: int
    F: int

    @property
    def hit(self) -> int:
        """Experts that have rows: all, or one for each row if there are fewer rows than experts."""
        return min(self.E, self.M)

    @property
    def sizes(self) -> list[int]:
        """Rows of each expert, as even as possible."""
        return [self.M // self.E + (expert < self.M % self.E) for expert in range(self.E)]

    @property
    def nbytes(self) -> int:
        """The matrices of experts that have rows, the rows and their results in bfloat16, each moved once."""
        return 2 * (self.hit * 3 * self.D * self.F + self.M * 2 * self.D)

    @property
    def flops(self) -> int:
        """Two for each multiplication."""
        return 2 * self.M * 3 * self.D * self.F


@dataclasses.dataclass(frozen=True)
class Linear:
    """M rows of width i times a matrix [o, i]."""

    label: str
    M: int
    i: int
    o: int

    @property
    def nbytes(self) -> int:
        """The matrix, the rows and the products in bfloat16, each moved once."""
        return 2 * (self.o * self.i + self.M * (self.i + self.o))

    @property
    def flops(self) -> int:
        """Two for each multiplication."""
        return 2 * self.M * self.i * self.o


@dataclasses.dataclass(frozen=True)
class Merge:
    """Partial attentions over ``parts`` sets of keys, of T queries of B rows and H heads, h numbers a head."""

    label: str
    B: int
    T: int
    H: int
    parts: int
    h: int = 128

    @property
    def nbytes(self) -> int:
        """Partial results and the whole one, each with its log-sum-exp, in float32; each moved once."""
        return 4 * self.B * self.T * self.H * (self.h + 1) * (self.parts + 1)

    @property
    def flops(self) -> int:
        """Each part times its weight, and the sum."""
        return 2 * self.parts * self.B * self.T * self.H * self.h


@dataclasses.dataclass(frozen=True)
class Splits:
    """Attention over each of ``splits`` parts of the cached keys; otherwise as :class:`Attention`."""

    label: str
    B: int
    T: int
    splits: int
    K: int = 8
    G: int = 4
    h: int = 128

    @property
    def nbytes(self) -> int:
        """Each split's results and log-sum-exps in float32, and the merged result in bfloat16; each moved once."""
        return self.B * self.T * self.K * self.G * (4 * self.splits * (self.h + 1) + 2 * self.h)

    @property
    def flops(self) -> int:
        """Each split times its weight, and the sum."""
        return 2 * self.B * self.T * self.K * self.G * self.splits * self.h


@dataclasses.dataclass(frozen=True)
class NewHeads:
    """Heads of one new token in each of B rows, rotated and written to a cache; K KV heads of G query heads each, head dimension h."""

    label: str
    B: int
    K: int = 8
    G: int = 4
    h: int = 128


@dataclasses.dataclass(frozen=True)
class Residual:
    """M rows of width D, and as many updates, which are added before the norm."""

    label: str
    M: int
    D: int


NODES = 26
"""Nodes of the tree ``eagle26``, the root included."""
# Llama 3.1 8B on one GPU; 70B, 405B and Llama 4 Scout and Maverick on ``tensor`` axes of 8 or 16; SmolLM2-135M.
REAL = {
    "tree_attention": [
        Attention("8B decode, 1 row, 1K", 1, 1, 1024),
        Attention("8B decode, 1 row, 8K", 1, 1, 8192),
        Attention("8B decode, 32 rows, 8K", 32, 1, 8192),
        Attention("8B chain of 3, 8 rows, 8K", 8, 4, 8192),
        Attention("8B eagle26, 1 row, 8K", 1, NODES, 8192),
        Attention("70B decode on tensor=8, 8 rows, 8K", 8, 1, 8192, K=1, G=8),
        Attention("405B decode on tensor=16, 32 rows, 8K", 32, 1, 8192, K=1, G=16),
        Attention("Scout decode on tensor=8, 1 row, 128K", 1, 1, 131072, K=1, G=5),
        Attention("Scout eagle26 on tensor=8, 8 rows, 8K", 8, NODES, 8192, K=1, G=5),
        Attention("Scout 64 nodes on tensor=8, 1 row, 8K", 1, 64, 8192, K=1, G=5),
        Attention("SmolLM2 decode, 8 rows, 2K", 8, 1, 2048, K=3, G=3, h=64),
        Attention("SmolLM2 64 nodes, 1 row, 2K", 1, 64, 2048, K=3, G=3, h=64),
    ],
    "flash_attention": [
        Attention("8B prefill, 2K", 1, 2048, 2048),
        Attention("8B prefill, 4K", 1, 4096, 4096),
        Attention("8B prefill, 2K after 6K", 1, 2048, 8192),
        Attention("70B prefill on tensor=8, 8K", 1, 8192, 8192, K=1, G=8),
        Attention("Scout prefill on tensor=8, 2 rows of 8K", 2, 8192, 8192, K=1, G=5),
        Attention("SmolLM2 prefill, 16 rows of 32", 16, 32, 32, K=3, G=3, h=64),
    ],
    "matmul": [
        Linear("8B queries, keys and values, 1 row", 1, 4096, 6144),
        Linear("8B gate and up, 1 row", 1, 4096, 28672),
        Linear("8B down, 1 row", 1, 14336, 4096),
        Linear("8B gate and up, 32 rows", 32, 4096, 28672),
        Linear("8B gate and up, 2048 rows", 2048, 4096, 28672),
    ],
    "experts": [
        Mixture("Scout on tensor=8, 1 row", 1, 16, 5120, 1024),
        Mixture("Scout on tensor=8, 8 rows", 8, 16, 5120, 1024),
        Mixture("Scout on tensor=8, 64 rows", 64, 16, 5120, 1024),
        Mixture("Maverick on expert=4,tensor=8, 32 rows", 32, 32, 5120, 1024),
        Mixture("Scout on tensor=8, 2048 rows", 2048, 16, 5120, 1024),
        Mixture("Scout on tensor=8, 8192 rows", 8192, 16, 5120, 1024),
        Mixture("Maverick on expert=4,tensor=8, 8192 rows", 8192, 32, 5120, 1024),
    ],
    "write_heads": [
        NewHeads("8B decode, 1 row", 1),
        NewHeads("8B decode, 32 rows", 32),
        NewHeads("Scout decode on tensor=8, 32 rows", 32, K=1, G=5),
    ],
    "add_norm": [
        Residual("8B decode, 1 row", 1, 4096),
        Residual("Scout decode, 8 rows", 8, 5120),
        Residual("405B decode, 32 rows", 32, 16384),
    ],
    "merge_splits": [
        Splits("8B decode, 1 row, 8K", 1, 1, 16),
        Splits("8B decode, 32 rows, 8K", 32, 1, 1),
        Splits("8B eagle26, 1 row, 8K", 1, NODES, 16),
        Splits("70B decode on tensor=8, 1 row, 8K", 1, 1, 128, K=1, G=8),
    ],
    "merge": [
        Merge("8B decode, cached and new, 32 rows", 32, 1, 32, 2),
        Merge("70B decode on sequence=8, 8 rows", 8, 1, 64, 8),
        Merge("8B prefill, cached and new, 2K", 1, 2048, 32, 2),
    ],
}

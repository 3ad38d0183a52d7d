"""How a piece of some prompts is spread over the ranks of a mesh. The host decides it for each piece."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from l4jax.cache import PAGE_SIZE, PageTables
from l4jax.model.steps.spread import PieceLayout, Spread
from l4jax.parallel.arrays import host_array
from l4jax.parallel.placement import Placement
from sharding.layout import EMPTY, balanced, batch
from sharding.ring import PARTIAL_BYTES
from sharding.select import RingHardware, RingStep, choose_ring

H100_RING = RingHardware(attention_flops=515e12, ring_bandwidth=25e9)
"""An H100's attention rate and its link to the next host, as measured in the context-parallelism paper (arXiv 2411.01783, table 5)."""


class Spreader:
    """Chooses the layouts and the ring variant for a model on a mesh."""

    def __init__(self, placement: Placement, dtype: jnp.dtype, hardware: RingHardware = H100_RING) -> None:
        self._config = placement.config
        self._ranks = placement.spec.token_ranks.count
        self._dtype = dtype
        self._hardware = hardware

    def program(self, rows: Sequence[tuple[int, int]], T: int) -> tuple[int, bool]:
        """What a piece's program depends on besides its size: the pages of cached tokens that each rank brings; whether chunks stay whole.

        ``rows``: (cached tokens, new tokens). The number of pages is a power of two, so that few programs are compiled.
        """
        if self._ranks == 1:
            return 0, False
        pages = -(-max(start for start, _ in rows) // (PAGE_SIZE * self._ranks))
        return 1 << (pages - 1).bit_length() if pages else 0, bool(self._aligned(rows, T))

    def _aligned(self, rows: Sequence[tuple[int, int]], T: int) -> list[np.ndarray]:
        chunk = self._config.attention_chunk_size
        return [] if chunk is None else aligned_layouts(rows, self._ranks, chunk, -(-T // self._ranks))

    def programs(self, T: int, longest: int) -> list[tuple[int, bool]]:
        """What :meth:`program` may return for a piece of a sequence of up to ``longest`` tokens."""
        widest, _ = self.program([(max(0, longest - 1), 0)], T)
        widths = [0, *(1 << i for i in range(widest.bit_length()))]
        chunk = self._config.attention_chunk_size or T
        aligned = [False, True] if self._ranks > 1 and self._aligned([(0, T // chunk * chunk)], T) else [False]
        return [(width, whole) for width in widths for whole in aligned]

    def spread(
        self, start_B: np.ndarray, new_B: np.ndarray, T: int, tables: PageTables, *, program: tuple[int, bool] | None = None
    ) -> tuple[PieceLayout | None, Spread | None]:
        """Spread ``new_B[b]`` tokens (padded to T) that follow ``start_B[b]`` cached ones; returns (None, None) if there is only one rank.

        Any number of tokens works, and a rank may get none. If every row allows it, attention chunks stay whole. ``program``: take this
        one (see :meth:`program`), for rows that have no tokens.
        """
        ranks = self._ranks
        if ranks == 1:
            return None, None
        rows = list(zip(start_B.tolist(), new_B.tolist(), strict=True))
        width, aligned = self.program(rows, T) if program is None else program
        layouts = self._aligned(rows, T) if aligned else [balanced(new, ranks, first=start) for start, new in rows]
        width = min(width, tables.full_BW.shape[1])
        # The program's sizes, not the number of tokens: the padding is sent too, and pieces of the same sizes share a program.
        step = RingStep(
            new_tokens=T,
            cached_tokens=width * PAGE_SIZE * ranks,
            ranks=ranks,
            num_heads=self._config.num_heads,
            num_kv_heads=self._config.num_kv_heads,
            bytes_per_element=self._dtype.itemsize,
            output_bytes_per_element=PARTIAL_BYTES,
        )
        layout = PieceLayout(host_array(batch(layouts, -(-T // ranks)), np.int32), tables.full_BW[:, :width])
        return layout, Spread(choose_ring(step, self._hardware).variant, aligned)


def aligned_layouts(rows: Sequence[tuple[int, int]], ranks: int, chunk: int, slots: int) -> list[np.ndarray]:
    """Layouts of rows (cached tokens, new tokens) that keep every attention chunk on one rank; an empty list if that is impossible.

    It is possible if every row begins at a chunk boundary, has at least one chunk for each rank, and fits in the ``slots`` of a
    rank. The last chunk is put on the rank that caches it.
    """
    layouts = []
    for start, new in rows:
        if new == 0:
            layouts.append(balanced(0, ranks))
            continue
        last_on = (start + new - 1) // chunk % ranks
        layout = balanced(new, ranks, first=start, block=chunk, last_on=last_on)
        if start % chunk or new < chunk * ranks or layout.shape[1] > slots:
            return []
        layouts.append(layout)
    return layouts


def in_order(values_BA: np.ndarray, position_RBT: np.ndarray, start_B: np.ndarray) -> np.ndarray:
    """Sort what the ranks computed, given one rank after the other along A (other axes may follow it), by position."""
    position_BA = np.swapaxes(position_RBT, 0, 1).reshape(len(start_B), -1)
    ordered_BA = np.zeros_like(values_BA)
    for row, position_A in enumerate(position_BA):
        present_A = position_A != EMPTY
        ordered_BA[row, position_A[present_A] - start_B[row]] = values_BA[row, present_A]
    return ordered_BA

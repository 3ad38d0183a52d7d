"""Builds the programs' inputs, small arrays on the host, from a step's rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from l4jax.cache import PAGE_SIZE, CacheShape, PageTables
from l4jax.decoding.params import SamplingParams
from l4jax.decoding.sampling import mask_words
from l4jax.decoding.slots import SlotMasks, SlotTokens, SlotUpdate
from l4jax.engine.step import Burst as BurstStep
from l4jax.engine.step import BurstRow, PageOnRank, PieceRow, Prefill
from l4jax.engine.tables import SlotTables
from l4jax.model.steps.spread import Spread
from l4jax.parallel.arrays import host_array
from l4jax.parallel.placement import Placement
from l4jax.parallel.spread import Spreader
from l4jax.program_inputs import Burst, Piece, slot_update
from l4jax.request import Request

_TOKENS_A_COUNT = 512
"""Tokens of a cached prefix that one call adds to a slot's counts."""
_PAGES_A_ZEROING = 32
"""Pages that one call zeroes on each data rank."""


class StepInputs:
    """Builds programs' inputs for a cache of one size.

    ``drafts``: the inputs have page tables for the drafter too. ``rows_apart``: as in :class:`l4jax.cache.PageTables`.
    """

    def __init__(self, placement: Placement, spreader: Spreader, shape: CacheShape, *, drafts: bool, rows_apart: bool) -> None:
        config, spec = placement.config, placement.spec
        self.shape = shape
        self._vocab_size, self._data = config.vocab_size, spec.data
        self._spreader, self._drafts = spreader, drafts
        tokens, chunk = config.max_position_embeddings, config.attention_chunk_size
        full_width = min(shape.full_pages, -(-tokens // (PAGE_SIZE * spec.token_ranks.count)))
        local_width = 1 if chunk is None else -(-min(chunk, tokens) // PAGE_SIZE)
        self._tables = SlotTables(shape.slots * spec.data, full_width, local_width, rows_apart=rows_apart)

    def piece(self, prefill: Prefill, padding: tuple[int, bool] | None) -> tuple[Piece, Spread | None]:
        """A prefill's inputs, and how token ranks share them; ``padding`` as in :meth:`l4jax.engine.runner.Runner.prefill_call`."""
        rows, T = prefill.rows, prefill.length
        token_BT = np.zeros((len(rows), T), np.int32)
        start_B, new_B, prompt_length_B = (np.zeros(len(rows), np.int32) for _ in range(3))
        ends_B, following_B = np.zeros(len(rows), np.bool_), np.full(len(rows), -1, np.int32)
        for i, row in enumerate(rows):
            if row is not None:
                token_BT[i, : len(row.tokens)] = row.tokens
                start_B[i], new_B[i], prompt_length_B[i] = row.start, len(row.tokens), row.prompt_length
                ends_B[i], following_B[i] = row.last, row.following
        tables = self._tables.of(rows)
        layout, spread = self._spreader.spread(start_B, new_B, T, tables, program=padding)
        piece = Piece(
            token_BT=host_array(token_BT, np.int32),
            start_B=host_array(start_B, np.int32),
            new_B=host_array(new_B, np.int32),
            prompt_length_B=host_array(prompt_length_B, np.int32),
            ends_B=host_array(ends_B, np.bool_),
            following_B=host_array(following_B, np.int32),
            slot_B=self._slot_numbers(rows),
            tables=tables,
            draft_tables=None if prefill.scores else self._draft_tables(tables),
            layout=layout,
        )
        return piece, spread

    def burst(self, burst: BurstStep) -> Burst:
        """A burst's inputs."""
        tables = self._tables.of(burst.rows)
        return Burst(
            slot_B=self._slot_numbers(burst.rows),
            limit_B=host_array([0 if row is None else row.limit for row in burst.rows], np.int32),
            tables=tables,
            draft_tables=self._draft_tables(tables),
            steps=host_array(burst.steps, np.int32),
        )

    def update(self, slots: Sequence[int], requests: Sequence[Request]) -> SlotUpdate:
        """Give these slots to these requests."""
        params, seeds = [request.params for request in requests], [request.seed for request in requests]
        stops = [request.stop_ids for request in requests]
        return slot_update(self.shape.slots * self._data, self._data, slots, params, seeds, stops, self._vocab_size)

    def masks(self, masks: Mapping[int, np.ndarray]) -> SlotMasks:
        """Say for these slots which tokens may be next."""
        slots = self.shape.slots
        slot_B = np.full(slots * self._data, slots, np.int32)
        allowed_BW = np.zeros((slots * self._data, mask_words(self._vocab_size)), np.uint32)
        for slot, allowed_W in masks.items():
            slot_B[slot], allowed_BW[slot] = slot % slots, allowed_W
        return SlotMasks(host_array(slot_B, np.int32), host_array(allowed_BW, np.uint32))

    def tokens_before(self, row: PieceRow) -> Iterator[SlotTokens]:
        """The tokens before a sequence's first piece, for each call that counts some of them in its slot."""
        for start in range(0, len(row.before), _TOKENS_A_COUNT):
            yield self._slot_tokens(row.slot, row.before[start : start + _TOKENS_A_COUNT], start, row.prompt_length)

    def take_to_zero(self, full: list[PageOnRank], local: list[PageOnRank]) -> PageTables:
        """Take as many pages off the lists as one call zeroes, and return them."""
        return PageTables(self._take_pages(full, self.shape.full_pages), self._take_pages(local, self.shape.local_pages))

    def examples(self) -> tuple[SlotUpdate, SlotTokens, PageTables]:
        """Example inputs, with the usual shapes, for the programs that update slots, count tokens and zero pages."""
        request = Request((), SamplingParams(), 0, ())
        return self.update([0], [request]), self._slot_tokens(-1, (), 0, 0), self.take_to_zero([], [])

    def _take_pages(self, pages: list[PageOnRank], padding: int) -> Array:
        page_BW = np.full((self._data, _PAGES_A_ZEROING), padding, np.int32)
        filled = [0] * self._data
        left = []
        for rank, page in pages:
            if filled[rank] < _PAGES_A_ZEROING:
                page_BW[rank, filled[rank]] = page
                filled[rank] += 1
            else:
                left.append((rank, page))
        pages[:] = left
        return host_array(page_BW, np.int32)

    def _slot_tokens(self, slot: int, tokens: Sequence[int], start: int, prompt_length: int) -> SlotTokens:
        """Tokens from position ``start`` on, to be counted in a slot; in none if ``slot`` is -1."""
        rank, ranks = slot // self.shape.slots, self._data
        token_BT = np.zeros((ranks, _TOKENS_A_COUNT), np.int32)
        token_BT[rank, : len(tokens)] = tokens  # for slot -1 there are none
        own = np.arange(ranks) == rank
        return SlotTokens(
            token_BT=host_array(token_BT, np.int32),
            start_B=host_array(np.full(ranks, start), np.int32),
            new_B=host_array(own * len(tokens), np.int32),
            prompt_length_B=host_array(np.full(ranks, prompt_length), np.int32),
            slot_B=host_array(np.where(own, slot % self.shape.slots, self.shape.slots), np.int32),
        )

    def _slot_numbers(self, rows: Sequence[PieceRow | BurstRow | None]) -> Array:
        """Each row's slot, counted on its own data rank; for padding a number past the last slot."""
        slots = self.shape.slots
        return host_array([slots if row is None else row.slot % slots for row in rows], np.int32)

    def _draft_tables(self, tables: Any) -> Any:
        """The model's tables, because the drafter's pages have the same numbers; None without a drafter."""
        return tables if self._drafts else None

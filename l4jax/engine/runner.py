"""Runs a step on the devices: builds the programs' inputs, dispatches them, and reads what they return."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from l4jax.cache import PAGE_SIZE, CacheShape, PageTables
from l4jax.compiled import Folder
from l4jax.decoding.generate import DecodeTokens
from l4jax.decoding.params import SamplingParams
from l4jax.decoding.plan import Speculation, SpeculationTable
from l4jax.decoding.slots import SlotTokens
from l4jax.decoding.speculate import BeyondTraining, RoundCounts
from l4jax.engine.memory import CacheMemory
from l4jax.engine.results import Dispatched
from l4jax.engine.step import Burst as BurstStep
from l4jax.engine.step import BurstRow, PageOnRank, PieceRow, Plan, Prefill, Step
from l4jax.engine.tables import SlotTables
from l4jax.model.step import Spread
from l4jax.parallel.arrays import host_array
from l4jax.parallel.placement import DrafterPlacement, Placement
from l4jax.parallel.spread import Spreader
from l4jax.program_inputs import Burst, FirstTokens, Piece, Resident, Weights, slot_update
from l4jax.programs import Programs
from l4jax.request import Request
from sharding.select import RingHardware

_COUNTED = 512
"""Tokens that one call counts for a slot, of those that it need not compute."""
_ZEROED = 32
"""Pages that one call zeroes on each data rank."""


@dataclasses.dataclass(frozen=True)
class Speculator:
    """A drafter on its target's mesh, how to speculate with it, and what it does beyond the length it was trained at.

    ``asked_for``: the user has said how; then a prompt that cannot be speculated for is an error.
    """

    placement: DrafterPlacement
    weights: Mapping[str, jax.Array]
    table: SpeculationTable
    beyond: BeyondTraining
    asked_for: bool

    def plans(self) -> tuple[dict[Plan, Speculation], tuple[tuple[int, Plan | None], ...]]:
        """Its trees by what the scheduler calls them, and the scheduler's table of them."""
        trees: dict[Plan, Speculation] = {}
        entries: list[tuple[int, Plan | None]] = []
        for rows, speculation in self.table.entries:
            plan = None if speculation is None else Plan(f"{rows} rows", speculation.tree.depth)
            if plan is not None and speculation is not None:
                trees[plan] = speculation
            entries.append((rows, plan))
        return trees, tuple(entries)


class Runner:
    """A model's programs, its weights, and what stays on the devices from one step to the next; a drafter's too, if there is one."""

    def __init__(
        self,
        placement: Placement,
        weights: Mapping[str, jax.Array],
        speculator: Speculator | None,
        ring_hardware: RingHardware,
        folder: Folder | None = None,
    ) -> None:
        """``weights`` (the drafter's too) as they are stored, or as their placement has placed them."""
        self.config = placement.config
        self.programs = Programs(placement, speculator.placement if speculator else None, folder)
        draft_leaves = self.programs.drafter.leaves(speculator.placement.place_all(speculator.weights)) if speculator else ()
        self._weights = Weights(self.programs.model.leaves(placement.place_all(weights)), draft_leaves)
        self._data, self._ranks = placement.spec.data, placement.spec.token_ranks.count
        self._spreader = Spreader(placement, self.dtype, ring_hardware)
        self._beyond = speculator.beyond if speculator else None
        self._plans = speculator.plans()[0] if speculator else {}
        self._resident: Resident | None = None
        self._ran: set[tuple[object, ...]] = set()

    @property
    def dtype(self) -> Any:
        """What weights and cache are held in."""
        return self._weights.target[0].dtype

    @property
    def platform(self) -> str:
        """What it runs on: "cpu" or "gpu"."""
        return next(iter(self._weights.target[0].devices())).platform

    @property
    def weights(self) -> dict[str, Array]:
        """The model's weights by name, as they lie on the mesh."""
        return dict(zip(self.programs.model.names, self._weights.target, strict=True))

    @property
    def all_weights(self) -> tuple[Array, ...]:
        """The model's and the drafter's."""
        return (*self._weights.target, *self._weights.drafter)

    def start(self, memory: CacheMemory, shape: CacheShape) -> None:
        """Allocate the cache, empty, with every slot free; what there was is lost. Raises ValueError if there is not enough memory."""
        self.stop()  # freed before the new one is allocated
        self._shape = shape
        tokens, chunk = self.config.max_position_embeddings, self.config.attention_chunk_size
        full_width = min(shape.full_pages, -(-tokens // (PAGE_SIZE * self._ranks)))
        local_width = 1 if chunk is None else -(-min(chunk, tokens) // PAGE_SIZE)
        self._tables = SlotTables(shape.slots * self._data, full_width, local_width)
        try:
            self._resident = Resident.empty(memory.abstract(shape))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            held = shape.full_pages * PAGE_SIZE * self._ranks * self._data
            raise ValueError(f"there is no memory for a KV cache of {held} tokens; set a lower kv_tokens, or max_batch") from error

    def stop(self) -> None:
        """Free the cache."""
        self._resident = None

    @property
    def resident(self) -> Resident:
        """What stays on the devices."""
        assert self._resident is not None
        return self._resident

    def has_run(self, step: Step) -> bool:
        """Whether programs of this step's sizes have been dispatched before; if not, dispatching it may compile them."""
        return _programs(step) <= self._ran

    def dispatch(self, step: Step, requests: Mapping[int, Request]) -> Dispatched:
        """Dispatch a step, in the order that :class:`Step` gives. ``requests``: those that it names."""
        assert not step.saves and not step.loads, "only deterministic schedulers save sequences"
        self._zero(list(step.zero_full), list(step.zero_local))
        first = [row for row in step.pieces if row is not None and row.first]
        if first:
            self._begin(first, requests)
        named = [row.request for row in (*step.pieces, *step.rows) if row is not None]
        sent: dict[str, Any] = {}
        if step.prefill is not None:
            sent["scored" if step.prefill.scores else "first"] = self.prefill(step.prefill)
        if step.burst is not None:
            sent["burst"], sent["counted"] = self.burst(step.burst)
        self._ran |= _programs(step)
        wanted = {request: requests[request].params.logprobs for request in named}
        dispatched = Dispatched(step, wanted, **sent)
        for leaf in jax.tree.leaves(dispatched.to_read):
            leaf.copy_to_host_async()
        return dispatched

    def _zero(self, full: list[PageOnRank], local: list[PageOnRank]) -> None:
        while full or local:
            pages = PageTables(self._pages_to_zero(full, self._shape.full_pages), self._pages_to_zero(local, self._shape.local_pages))
            self._resident = self.programs.zero_pages(self.resident, pages)

    def _pages_to_zero(self, pages: list[PageOnRank], past: int) -> Array:
        """The next pages to zero, which are taken off the list."""
        page_BW = np.full((self._data, _ZEROED), past, np.int32)
        free = [0] * self._data
        left = []
        for rank, page in pages:
            if free[rank] < _ZEROED:
                page_BW[rank, free[rank]] = page
                free[rank] += 1
            else:
                left.append((rank, page))
        pages[:] = left
        return host_array(page_BW, np.int32)

    def _begin(self, rows: Sequence[PieceRow], requests: Mapping[int, Request]) -> None:
        """Give slots to requests; and count the tokens that they need not compute, where a penalty will ask for the counts."""
        asked = [requests[row.request] for row in rows]
        slots, params = [row.slot for row in rows], [request.params for request in asked]
        seeds, stops = [request.seed for request in asked], [request.stop_ids for request in asked]
        update = slot_update(self._shape.slots * self._data, self._data, slots, params, seeds, stops, self.config.vocab_size)
        changed = self.programs.update_slots(self.resident.slots, update)
        for row, request in zip(rows, asked, strict=True):
            if request.params.adjusts_logits:
                for start in range(0, len(row.before), _COUNTED):
                    changed = self.programs.count(
                        changed, self._counted(row.slot, row.before[start : start + _COUNTED], start, row.prompt_length)
                    )
        self._resident = dataclasses.replace(self.resident, slots=changed)

    def _counted(self, slot: int, tokens: Sequence[int], start: int, prompt_length: int) -> SlotTokens:
        """Tokens from position ``start`` on, to be counted in a slot; in none if ``slot`` is -1."""
        rank, D = slot // self._shape.slots, self._data
        token_BT = np.zeros((D, _COUNTED), np.int32)
        token_BT[rank, : len(tokens)] = tokens  # a rank of -1 has none
        own = np.arange(D) == rank
        return SlotTokens(
            token_BT=host_array(token_BT, np.int32),
            start_B=host_array(np.full(D, start), np.int32),
            new_B=host_array(own * len(tokens), np.int32),
            prompt_length_B=host_array(np.full(D, prompt_length), np.int32),
            slot_B=host_array(np.where(own, slot % self._shape.slots, self._shape.slots), np.int32),
        )

    def begin_nobody(self) -> None:
        """Run the programs that change slots and pages, and change nothing."""
        a_rank, U = self._shape.slots, self._shape.slots * self._data
        update = slot_update(U, self._data, [0], [SamplingParams()], [0], [[]], self.config.vocab_size)
        nobody = dataclasses.replace(update, slot_B=host_array(np.full(U, a_rank), np.int32))
        slots = self.programs.update_slots(self.resident.slots, nobody)
        slots = self.programs.count(slots, self._counted(-1, (), 0, 0))
        self._resident = dataclasses.replace(self.resident, slots=slots)
        self._zero([(0, self._shape.full_pages)], [])

    def spreads(self, length: int, longest: int) -> list[tuple[int, bool]]:
        """The ``padding`` of :meth:`prefill` that makes each program for pieces of this length, of up to ``longest`` tokens."""
        return self._spreader.programs(length, longest)

    def prefill(self, prefill: Prefill, *, padding: tuple[int, bool] | None = None) -> FirstTokens | tuple[Array, Piece]:
        """Prefill; with ``padding`` rows of padding only, by the program for this many cached pages, with whole chunks or not.

        Returns the first tokens, or of a prefill for scores the logits and where they are.
        """
        piece, spread = self._piece(prefill, padding)
        resident = self.resident
        if prefill.scores:
            cache, logits_BAV = self.programs.logits(self._weights, resident.cache, piece, spread=spread)
            self._resident = dataclasses.replace(resident, cache=cache)
            return logits_BAV, piece
        self._resident, first = self.programs.prefill(self._weights, resident, piece, spread=spread, beyond=self._beyond)
        return first

    def _piece(self, prefill: Prefill, padding: tuple[int, bool] | None) -> tuple[Piece, Spread | None]:
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

    def burst(self, burst: BurstStep) -> tuple[DecodeTokens, RoundCounts | None]:
        """Decode, or speculate."""
        tables = self._tables.of(burst.rows)
        inputs = Burst(
            slot_B=self._slot_numbers(burst.rows),
            limit_B=host_array([0 if row is None else row.limit for row in burst.rows], np.int32),
            tables=tables,
            draft_tables=self._draft_tables(tables),
            steps=host_array(burst.steps, np.int32),
        )
        if burst.plan is None:
            self._resident, tokens = self.programs.decode(self._weights, self.resident, inputs, beyond=self._beyond)
            return tokens, None
        plan = self._plans[burst.plan]
        self._resident, tokens, counted = self.programs.speculate(self._weights, self.resident, inputs, plan=plan, beyond=self._beyond)
        return tokens, counted

    def _slot_numbers(self, rows: Sequence[PieceRow | BurstRow | None]) -> Array:
        """Each row's slot, counted on its own data rank; past the last one for padding."""
        a_rank = self._shape.slots
        return host_array([a_rank if row is None else row.slot % a_rank for row in rows], np.int32)

    def _draft_tables(self, tables: Any) -> Any:
        """The drafter's pages have the numbers of the model's."""
        return tables if self._beyond is not None else None


def _programs(step: Step) -> set[tuple[object, ...]]:
    """What tells a step's programs apart, but for how a mesh's token ranks share a piece."""
    pieces = {(step.prefill.length, len(step.pieces), step.prefill.scores)} if step.prefill else set()
    return pieces | ({(step.burst.plan, len(step.rows))} if step.burst else set())

"""Runs a step on the devices: owns what stays there, and dispatches the programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from l4jax.cache import PAGE_SIZE, CacheShape
from l4jax.compiled import Call, Folder, ProgramInfo
from l4jax.engine.inputs import StepInputs
from l4jax.engine.memory import CacheMemory
from l4jax.engine.results import Dispatched, Scored
from l4jax.engine.saved import SavedSequences
from l4jax.engine.speculator import Speculator
from l4jax.engine.step import Burst as BurstStep
from l4jax.engine.step import PageOnRank, PieceRow, Prefill, Step
from l4jax.parallel.arrays import host_array
from l4jax.parallel.placement import Placement
from l4jax.parallel.spread import Spreader
from l4jax.program_inputs import Resident, Weights
from l4jax.programs import Programs
from l4jax.request import Request
from sharding.select import RingHardware


class Runner:
    """A model's programs, its weights, and what stays on the devices from one step to the next; a drafter's too, if there is one."""

    def __init__(
        self,
        placement: Placement,
        weights: Mapping[str, jax.Array],
        speculator: Speculator | None,
        ring_hardware: RingHardware,
        folder: Folder | None = None,
        *,
        rows_apart: bool = False,
    ) -> None:
        """``weights`` (the drafter's too) as they are stored, or as their placement has placed them.

        ``rows_apart``: each row's results are the same to the last bit whatever the other rows are, if programs' sizes are.
        """
        self.config = placement.config
        self.programs = Programs(placement, speculator.placement if speculator else None, folder)
        draft_leaves = self.programs.drafter.leaves(speculator.placement.place_all(speculator.weights)) if speculator else ()
        self._weights = Weights(self.programs.model.leaves(placement.place_all(weights)), draft_leaves)
        self._data, self._ranks = placement.spec.data, placement.spec.token_ranks.count
        self._spreader = Spreader(placement, self.dtype, ring_hardware)
        self._beyond = speculator.beyond if speculator else None
        self._plans = speculator.plans()[0] if speculator else {}
        self._spec = placement.spec
        self._inputs_for = functools.partial(StepInputs, placement, self._spreader, drafts=self._beyond is not None, rows_apart=rows_apart)
        self._inputs = self._inputs_for(CacheShape(0, 0, 0))
        self._resident: Resident | None = None
        self._saved = SavedSequences(self.programs, self._spec)
        self._ready: set[tuple[object, ...]] = set()

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
        self.lay_out(shape)
        try:
            self._resident = Resident.empty(memory.abstract(shape))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            held = shape.full_pages * PAGE_SIZE * self._ranks * self._data
            raise ValueError(f"there is no memory for a KV cache of {held} tokens; set a lower kv_tokens, or max_batch") from error

    def lay_out(self, shape: CacheShape) -> None:
        """Make calls for a cache of this size."""
        if shape != self._inputs.shape:
            self._ready.clear()
        self._inputs = self._inputs_for(shape)

    def stop(self) -> None:
        """Free the cache, and drop what is saved of it."""
        self._resident = None
        self._saved = SavedSequences(self.programs, self._spec)

    @property
    def resident(self) -> Resident:
        """What stays on the devices."""
        assert self._resident is not None
        return self._resident

    def is_ready_for(self, step: Step) -> bool:
        """Whether programs of this step's sizes have been used or prepared before; if not, dispatching it may compile them."""
        return _programs(step) <= self._ready

    def prepare(self, part: Prefill | BurstStep, resident: Resident, padding: tuple[int, bool] | None = None) -> ProgramInfo:
        """Compile, or load, the program for a part of a step; ``padding`` as in :meth:`prefill_call`. ``resident`` may be abstract."""
        call = self.prefill_call(part, resident, padding=padding) if isinstance(part, Prefill) else self.burst_call(part, resident)
        info = call.prepare()
        self._ready.add(_sizes(part))
        return info

    def dispatch(self, step: Step, requests: Mapping[int, Request]) -> Dispatched:
        """Dispatch a step, in the order that :class:`Step` gives. ``requests``: those that it names."""
        self._saved.fetch()
        for request in step.drops:
            self._saved.drop(request)
        for save in step.saves:
            self._saved.save(self.resident, save)
        self._zero(list(step.zero_full), list(step.zero_local))
        for load in step.loads:
            self._resident = self._saved.load(self.resident, load)
        first = [row for row in step.pieces if row is not None and row.first]
        if first:
            self._begin(first, requests)
        wanted = {row.request: requests[row.request].params.logprobs for row in (*step.pieces, *step.rows) if row is not None}
        sent: dict[str, Any] = {}
        if step.prefill is not None:
            sent |= self._prefill(step.prefill, wanted)
        if step.burst is not None:
            sent |= self._burst(step.burst)
        self._ready |= _programs(step)
        dispatched = Dispatched(step, wanted, **sent)
        for leaf in jax.tree.leaves(dispatched.to_read):
            leaf.copy_to_host_async()
        return dispatched

    def _zero(self, full: list[PageOnRank], local: list[PageOnRank]) -> None:
        while full or local:
            self._resident = self.programs.zero_pages(self.resident, self._inputs.next_to_zero(full, local))

    def _begin(self, rows: Sequence[PieceRow], requests: Mapping[int, Request]) -> None:
        """Give slots to requests; and count the tokens that they need not compute, where a penalty will ask for the counts."""
        asked = [requests[row.request] for row in rows]
        changed = self.programs.update_slots(self.resident.slots, self._inputs.update([row.slot for row in rows], asked))
        for row, request in zip(rows, asked, strict=True):
            if request.params.adjusts_logits:
                for tokens in self._inputs.counted(row):
                    changed = self.programs.count(changed, tokens)
        self._resident = dataclasses.replace(self.resident, slots=changed)

    def small_calls(self, resident: Resident, *, saves: bool) -> list[Call]:
        """Calls of the programs that change slots and pages, and with ``saves`` of those that save them and load them again."""
        slots = resident.slots
        update, tokens, pages = self._inputs.examples()
        return [
            Call(self.programs.update_slots, (slots, update), {}),
            Call(self.programs.count, (slots, tokens), {}),
            Call(self.programs.zero_pages, (resident, pages), {}),
            *(self._saved.calls(resident) if saves else ()),
        ]

    def spreads(self, length: int, longest: int) -> list[tuple[int, bool]]:
        """The ``padding`` of :meth:`prefill_call` that makes each program for pieces of this length, of up to ``longest`` tokens."""
        return self._spreader.programs(length, longest)

    def prefill_call(
        self,
        prefill: Prefill,
        resident: Resident,
        wanted: Mapping[int, int | None] | None = None,
        *,
        padding: tuple[int, bool] | None = None,
    ) -> Call:
        """The call of a prefill; with ``padding`` of rows of padding, by the program for this many cached pages, with whole chunks or not.

        It returns the first tokens and what stays; of a prefill for scores the cache, the logits, and the log-probabilities if any row's
        request is ``wanted`` to have them (as in :class:`Dispatched`).
        """
        piece, spread = self._inputs.piece(prefill, padding)
        if prefill.scores:
            wanted_B = [row is not None and wanted is not None and wanted[row.request] is not None for row in prefill.rows]
            arguments = (self._weights, resident.cache, piece, host_array(wanted_B, np.bool_))
            return Call(self.programs.score, arguments, {"spread": spread})
        return Call(self.programs.prefill, (self._weights, resident, piece), {"spread": spread, "beyond": self._beyond})

    def _prefill(self, prefill: Prefill, wanted: Mapping[int, int | None]) -> dict[str, Any]:
        """Prefill; returns the first tokens, or of a prefill for scores these and where they are, by their names in Dispatched."""
        call = self.prefill_call(prefill, self.resident, wanted)
        if prefill.scores:
            cache, logits_BAV, logprobs = call.run()
            self._resident = dataclasses.replace(self.resident, cache=cache)
            return {"scored": Scored(logits_BAV, logprobs, call.arguments[2])}
        self._resident, first = call.run()
        return {"first": first}

    def burst_call(self, burst: BurstStep, resident: Resident) -> Call:
        """The call of a burst, which decodes or speculates: it returns what stays, the tokens, and of rounds what was drafted."""
        arguments = (self._weights, resident, self._inputs.burst(burst))
        if burst.plan is None:
            return Call(self.programs.decode, arguments, {"beyond": self._beyond})
        return Call(self.programs.speculate, arguments, {"plan": self._plans[burst.plan], "beyond": self._beyond})

    def _burst(self, burst: BurstStep) -> dict[str, Any]:
        """Decode or speculate; returns the tokens, and what was drafted, by their names in Dispatched."""
        self._resident, *out = self.burst_call(burst, self.resident).run()
        return dict(zip(("burst", "counted"), out, strict=False))


def _programs(step: Step) -> set[tuple[object, ...]]:
    """What tells the larger programs of a step apart."""
    copies: set[tuple[object, ...]] = {(kind,) for kind, copied in (("save", step.saves), ("load", step.loads)) if copied}
    return copies | {_sizes(part) for part in (step.prefill, step.burst) if part is not None}


def _sizes(part: Prefill | BurstStep) -> tuple[object, ...]:
    """What tells a part's program apart, but for how a mesh's token ranks share a piece."""
    return (part.plan, len(part.rows)) if isinstance(part, BurstStep) else (part.length, len(part.rows), part.scores)

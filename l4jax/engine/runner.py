"""Runs a step on the devices: owns the state that stays there, and dispatches the programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from l4jax.cache import PAGE_SIZE, CacheShape
from l4jax.compiled import Call, Folder
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
    """A model's programs, its weights, and the state on the devices between steps; a drafter's too, if there is one."""

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
        """``weights`` (the drafter's too) as they are stored, or already placed.

        ``rows_apart``: for programs of the same sizes, a row's results are the same to the last bit whatever the other rows are.
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
        """The dtype of weights and cache."""
        return self._weights.target[0].dtype

    @property
    def platform(self) -> str:
        """The devices' platform: "cpu" or "gpu"."""
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
        """Allocate an empty cache and free slots; the state before is lost. Raises ValueError if there is not enough memory."""
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
        """Build inputs for a cache of this size from now on, and drop the programs for one of another size."""
        if shape != self._inputs.shape:
            self._ready.clear()
            self.programs.forget()
        self._inputs = self._inputs_for(shape)

    def stop(self) -> None:
        """Free the cache, and drop saved sequences. The traceback of an error that somebody keeps may refer to the cache's arrays."""
        for leaf in jax.tree.leaves(self._resident):
            if not leaf.is_deleted():
                leaf.delete()
        self._resident = None
        self._saved = SavedSequences(self.programs, self._spec)

    @property
    def resident(self) -> Resident:
        """The state on the devices; there must be one."""
        assert self._resident is not None
        return self._resident

    def is_ready_for(self, step: Step) -> bool:
        """Whether programs of this step's sizes have been run or prepared before; if not, dispatching the step may compile them."""
        return _programs(step) <= self._ready

    def prepare(self, part: Prefill | BurstStep, resident: Resident, padding: tuple[int, bool] | None = None) -> None:
        """Compile, or load, the program of a prefill or a burst; ``padding`` as in :meth:`prefill_call`. ``resident`` may be abstract."""
        self.call(part, resident, padding).prepare()
        self._ready.add(_sizes(part))

    def call(self, part: Prefill | BurstStep, resident: Resident, padding: tuple[int, bool] | None = None) -> Call:
        """The call of a prefill or a burst; ``padding`` as in :meth:`prefill_call`."""
        return self.prefill_call(part, resident, padding=padding) if isinstance(part, Prefill) else self.burst_call(part, resident)

    def dispatch(self, step: Step, requests: Mapping[int, Request], masks: Mapping[int, np.ndarray]) -> Dispatched:
        """Dispatch a step, in the order that :class:`Step` gives. ``requests``: those that it names.

        ``masks``: by slot, which tokens may be next, for requests with a guide; as :class:`l4jax.decoding.sampling.SamplingRows` has them.
        """
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
        if masks:
            slots = self.programs.mask(self.resident.slots, self._inputs.masks(masks))
            self._resident = dataclasses.replace(self.resident, slots=slots)
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
            self._resident = self.programs.zero_pages(self.resident, self._inputs.take_to_zero(full, local))

    def _begin(self, rows: Sequence[PieceRow], requests: Mapping[int, Request]) -> None:
        """Give slots to the requests of first pieces. For those with penalties, count the tokens that no piece will compute."""
        admitted = [requests[row.request] for row in rows]
        slots = self.programs.update_slots(self.resident.slots, self._inputs.update([row.slot for row in rows], admitted))
        for row, request in zip(rows, admitted, strict=True):
            if request.params.adjusts_logits:
                for tokens in self._inputs.tokens_before(row):
                    slots = self.programs.count(slots, tokens)
        self._resident = dataclasses.replace(self.resident, slots=slots)

    def small_calls(self, resident: Resident, *, saves: bool) -> list[Call]:
        """Calls of the programs that update slots and zero pages, and with ``saves`` of those that save and load a sequence."""
        slots = resident.slots
        update, tokens, pages = self._inputs.examples()
        return [
            Call(self.programs.update_slots, (slots, update), {}),
            Call(self.programs.count, (slots, tokens), {}),
            Call(self.programs.mask, (slots, self._inputs.masks({})), {}),
            Call(self.programs.zero_pages, (resident, pages), {}),
            *(self._saved.calls(resident) if saves else ()),
        ]

    def spreads(self, length: int, longest: int) -> list[tuple[int, bool]]:
        """A ``padding`` of :meth:`prefill_call` for each program of pieces of this length, in sequences of up to ``longest`` tokens."""
        return self._spreader.programs(length, longest)

    def prefill_call(
        self,
        prefill: Prefill,
        resident: Resident,
        wanted: Mapping[int, int | None] | None = None,
        *,
        padding: tuple[int, bool] | None = None,
    ) -> Call:
        """The call of a prefill. ``padding``: all rows are padding; take the program for (this many cached pages, whole chunks or not).

        The program returns the new resident state and the first tokens. If the prefill is for scores, it returns the cache, the logits,
        and log-probabilities if any row's request is ``wanted`` to have them (as in :class:`Dispatched`).
        """
        piece, spread = self._inputs.piece(prefill, padding)
        if prefill.scores:
            wanted_B = [row is not None and wanted is not None and wanted[row.request] is not None for row in prefill.rows]
            arguments = (self._weights, resident.cache, piece, host_array(wanted_B, np.bool_))
            return Call(self.programs.score, arguments, {"spread": spread})
        return Call(self.programs.prefill, (self._weights, resident, piece), {"spread": spread, "beyond": self._beyond})

    def _prefill(self, prefill: Prefill, wanted: Mapping[int, int | None]) -> dict[str, Any]:
        """Dispatch a prefill. Returns the fields of Dispatched for it: the first tokens, or the scores."""
        call = self.prefill_call(prefill, self.resident, wanted)
        if prefill.scores:
            cache, logits_BAV, logprobs = call.run()
            self._resident = dataclasses.replace(self.resident, cache=cache)
            return {"scored": Scored(logits_BAV, logprobs, call.arguments[2])}
        self._resident, first = call.run()
        return {"first": first}

    def burst_call(self, burst: BurstStep, resident: Resident) -> Call:
        """The call of a burst. The program returns the new resident state, the tokens and, if it speculates, its rounds' counts."""
        arguments = (self._weights, resident, self._inputs.burst(burst))
        if burst.plan is None:
            return Call(self.programs.decode, arguments, {"beyond": self._beyond})
        return Call(self.programs.speculate, arguments, {"plan": self._plans[burst.plan], "beyond": self._beyond})

    def _burst(self, burst: BurstStep) -> dict[str, Any]:
        """Dispatch a burst. Returns the fields of Dispatched for it: the tokens, and the rounds' counts if it speculates."""
        self._resident, *out = self.burst_call(burst, self.resident).run()
        return dict(zip(("burst", "round_counts"), out, strict=False))


def _programs(step: Step) -> set[tuple[object, ...]]:
    """The keys of a step's larger programs."""
    copies: set[tuple[object, ...]] = {(kind,) for kind, copied in (("save", step.saves), ("load", step.loads)) if copied}
    return copies | {_sizes(part) for part in (step.prefill, step.burst) if part is not None}


def _sizes(part: Prefill | BurstStep) -> tuple[object, ...]:
    """The key of a prefill's or a burst's program, without how a mesh's token ranks share a piece."""
    return (part.plan, len(part.rows)) if isinstance(part, BurstStep) else (part.length, len(part.rows), part.scores)

"""Compiles programs at full size with abstract weights, and reads their costs off the result."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from l4jax.cache import CacheShape
from l4jax.compiled import Call, device_bytes
from l4jax.config import DrafterConfig, ModelConfig
from l4jax.decoding.generate import BURST
from l4jax.decoding.params import SamplingParams
from l4jax.decoding.plan import Speculation
from l4jax.model.steps.spread import Spread
from l4jax.parallel.arrays import host_array
from l4jax.parallel.placement import DrafterPlacement, Placement
from l4jax.parallel.spread import Spreader
from l4jax.planning.ledger import Collective, Ledger
from l4jax.program_inputs import Burst, Piece, Resident, Weights
from l4jax.programs import Programs
from sharding.mesh import MeshSpec
from sharding.select import Variant


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A compiled program's text, and its bytes on each device."""

    text: str
    mesh: MeshSpec
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    donated_bytes: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled, mesh: MeshSpec) -> CompiledProgram:
        """Read the costs off a program that was compiled for a mesh."""
        memory = compiled.memory_analysis()
        assert memory is not None
        return cls(
            compiled.as_text() or "",
            mesh,
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.alias_size_in_bytes,
        )

    @property
    def device_bytes(self) -> int:
        """Memory that the program needs on a device while it runs."""
        return self.argument_bytes + self.output_bytes - self.donated_bytes + self.temporary_bytes

    @functools.cached_property
    def ledger(self) -> Ledger:
        """Its matrix products and collectives, counted."""
        return Ledger(self.text, self.mesh)

    @property
    def collectives(self) -> list[Collective]:
        """Every collective, those in loop bodies once; XLA may have merged several into one of many results."""
        return self.ledger.collectives

    def collective_table(self) -> str:
        """Collectives by kind and strategy: their number, and their total bytes on each device."""
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        nbytes: collections.Counter[tuple[str, str]] = collections.Counter()
        for collective in self.collectives:
            counts[collective.kind, collective.strategy] += 1
            nbytes[collective.kind, collective.strategy] += sum(collective.nbytes)
        lines = [
            f"{kind:20} {strategy:8} {counts[kind, strategy]:5} {nbytes[kind, strategy]:14,} bytes" for kind, strategy in sorted(counts)
        ]
        return "\n".join(lines) or "none"


def first_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """The same model, cut to its first layers: layers repeat, so a few tell the cost of all and compile sooner."""
    moe = config.moe and dataclasses.replace(config.moe, moe_layers=config.moe.moe_layers[:layers])
    return dataclasses.replace(config, num_layers=layers, rope_layers=config.rope_layers[:layers], moe=moe)


class AbstractModel:
    """A full-size model without values: only the shapes of its arrays exist, and its devices may be mere descriptions.

    ``decode``, ``speculate`` and ``prefill`` compile a program; ``decode_call``, ``speculate_call``, ``prefill_call`` and ``score_call``
    return a program with its arguments, uncompiled.
    """

    def __init__(
        self, config: ModelConfig, mesh: MeshSpec, devices: Sequence[jax.Device], dtype: jnp.dtype, drafter: DrafterConfig | None = None
    ) -> None:
        on = mesh.build(devices)
        self.placement = Placement(config, on)
        self.draft_placement = DrafterPlacement(drafter, on) if drafter else None
        self.programs = Programs(self.placement, self.draft_placement)
        self._dtype = dtype
        draft_leaves = self.programs.drafter.leaves(self.draft_placement.abstract_weights(dtype)) if self.draft_placement else ()
        self.weights = Weights(self.programs.model.leaves(self.placement.abstract_weights(dtype)), draft_leaves)

    def decode(self, rows: int, capacity: int, params: SamplingParams) -> CompiledProgram:
        """The decode program for ``rows`` sequences of up to ``capacity`` tokens; the same for all ``params``. Nothing is drafted."""
        del params  # one program serves all
        return self._compiled(self.decode_call(rows, capacity))

    def decode_call(self, rows: int, capacity: int, *, drafting: bool = False) -> Call:
        """As :meth:`decode`; arguments: weights, resident state, burst. With ``drafting`` each step makes the drafter's entry too."""
        arguments = (self.weights, self._resident(rows, capacity), self._burst(rows, capacity, drafting=drafting))
        return Call(self.programs.decode, arguments, {"beyond": "window" if drafting else None})

    def speculate(self, rows: int, capacity: int, plan: Speculation) -> CompiledProgram:
        """The program that runs rounds of speculation with the model's drafter, for ``rows`` sequences of up to ``capacity`` tokens."""
        return self._compiled(self.speculate_call(rows, capacity, plan))

    def speculate_call(self, rows: int, capacity: int, plan: Speculation) -> Call:
        """As :meth:`speculate`; arguments: weights, resident state, burst."""
        if self.draft_placement is None:
            raise ValueError("the model has no drafter to speculate with; expected AbstractModel(..., drafter=...)")
        arguments = (self.weights, self._resident(rows, capacity), self._burst(rows, capacity, drafting=True))
        return Call(self.programs.speculate, arguments, {"plan": plan, "beyond": "window"})

    def prefill(self, tokens: int, cached: int, capacity: int, variant: Variant | None = None) -> CompiledProgram:
        """The program for a piece of ``tokens`` of each data rank's prompt, of which ``cached`` tokens are cached.

        ``variant``: the ring to use; None: the one that the runner would choose.
        """
        return self._compiled(self.prefill_call(tokens, cached, capacity, variant))

    def prefill_call(self, tokens: int, cached: int, capacity: int, variant: Variant | None = None) -> Call:
        """As :meth:`prefill`; arguments: weights, resident state, piece."""
        piece, spread = self._piece(tokens, cached, capacity, variant)
        arguments = (self.weights, self._resident(self.placement.spec.data, capacity), piece)
        return Call(self.programs.prefill, arguments, {"spread": spread, "beyond": None})

    def score_call(self, tokens: int, cached: int, capacity: int) -> Call:
        """The program that computes the logits at every token of a piece.

        Arguments: weights, cache, piece, which rows want log-probabilities.
        """
        piece, spread = self._piece(tokens, cached, capacity, None)
        cache = self._resident(self.placement.spec.data, capacity).cache
        wanted_B = jax.ShapeDtypeStruct((self.placement.spec.data,), jnp.bool_, sharding=self.placement.array_sharding("batch"))
        return Call(self.programs.score, (self.weights, cache, piece, wanted_B), {"spread": spread})

    def _resident(self, rows: int, capacity: int) -> Resident:
        return Resident.abstract(self.placement, self.draft_placement, self._shape(rows, capacity), self._dtype)

    def _burst(self, rows: int, capacity: int, *, drafting: bool) -> Burst:
        # Real values: benchmarks run the program with them.
        shape, a_rank = self._shape(rows, capacity), np.arange(rows) % (rows // self.placement.spec.data)
        tables, limit_B = shape.identity_tables(a_rank), host_array(np.full(rows, capacity), np.int32)
        return Burst(host_array(a_rank, np.int32), limit_B, tables, tables if drafting else None, host_array(BURST, np.int32))

    def _piece(self, tokens: int, cached: int, capacity: int, variant: Variant | None) -> tuple[Piece, Spread | None]:
        rows = self.placement.spec.data
        tables = self._shape(rows, capacity).identity_tables([0] * rows)
        layout, spread = Spreader(self.placement, self._dtype).spread(np.full(rows, cached), np.full(rows, tokens), tokens, tables)
        if spread is not None and variant is not None:
            spread = dataclasses.replace(spread, variant=variant)
        return Piece.abstract(self.placement, tokens, tables, layout), spread

    def cache_bytes(self, rows: int, capacity: int) -> int:
        """Bytes of the cache on each device."""
        return device_bytes(self._resident(rows, capacity).cache)

    def _shape(self, rows: int, capacity: int) -> CacheShape:
        return CacheShape.for_rows(self.placement.config, rows, capacity, self.placement.spec)

    def _compiled(self, call: Call) -> CompiledProgram:
        return CompiledProgram.of(call.lower().compile(), self.placement.spec)

"""Programs compiled with abstract weights, at full size, and what is read off them."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax.cache import CACHE_AXES, CacheShape, LayerCache, PageTables
from l4jax.config import DrafterConfig, ModelConfig
from l4jax.decoding.draft import DraftState
from l4jax.decoding.generate import DecodeState
from l4jax.decoding.params import SamplingParams
from l4jax.decoding.plan import Speculation
from l4jax.decoding.sampling import SamplingFeatures, SamplingRows, batch_features, sampling_rows
from l4jax.decoding.speculate import SpeculationState
from l4jax.placement import DrafterPlacement, Placement
from l4jax.planning.ledger import Collective, Ledger
from l4jax.programs import Programs
from l4jax.spread import Spreader
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

    @property
    def device_bytes(self) -> int:
        """Memory that it needs on a device while it runs."""
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
        """Collectives by kind: how often, and bytes on each device in all."""
        counts: collections.Counter[str] = collections.Counter()
        nbytes: collections.Counter[str] = collections.Counter()
        for collective in self.collectives:
            counts[collective.kind] += 1
            nbytes[collective.kind] += sum(collective.nbytes)
        return "\n".join(f"{kind:20} {counts[kind]:5} {nbytes[kind]:14,} bytes" for kind in sorted(counts)) or "none"


def first_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """The same model with no more than its first layers: what layers cost repeats, and a few compile sooner."""
    moe = config.moe and dataclasses.replace(config.moe, moe_layers=config.moe.moe_layers[:layers])
    return dataclasses.replace(config, num_layers=layers, rope_layers=config.rope_layers[:layers], moe=moe)


class AbstractModel:
    """A model at full size of which only shapes exist, on a mesh of devices that need not."""

    def __init__(
        self, config: ModelConfig, mesh: MeshSpec, devices: Sequence[jax.Device], dtype: jnp.dtype, drafter: DrafterConfig | None = None
    ) -> None:
        on = mesh.build(devices)
        self._placement = Placement(config, on)
        self._draft_placement = DrafterPlacement(drafter, on) if drafter else None
        self._programs = Programs(self._placement, self._draft_placement)
        self._dtype = dtype
        self._leaves = self._programs.model.leaves(self._placement.abstract_weights(dtype))

    def decode(self, rows: int, capacity: int, params: SamplingParams) -> CompiledProgram:
        """The decode program for ``rows`` sequences of up to ``capacity`` tokens."""
        state, tables, settings, features = self._decoding(rows, capacity, params)
        return self._compiled(self._programs.decode.lower(self._leaves, state, tables, settings, np.int32(1), features=features))

    def speculate(self, rows: int, capacity: int, params: SamplingParams, plan: Speculation) -> CompiledProgram:
        """The program of rounds of speculation, likewise, with the model's drafter."""
        placement = self._draft_placement
        if placement is None:
            raise ValueError("the model has no drafter to speculate with; expected AbstractModel(..., drafter=...)")
        state, tables, settings, features = self._decoding(rows, capacity, params)
        shape = self._shape(rows, capacity)
        hidden_BD: Any = jax.ShapeDtypeStruct(
            (rows, placement.config.hidden_size), self._dtype, sharding=self._placement.array_sharding("batch")
        )
        draft = DraftState(self._cache(shape, placement.config), hidden_BD)
        leaves = self._programs.drafter.leaves(placement.abstract_weights(self._dtype))
        draft_tables = shape.identity_tables(placement.config, range(rows))
        arguments = (self._leaves, leaves, SpeculationState(state, draft), tables, draft_tables, settings, np.int32(1))
        return self._compiled(self._programs.speculate.lower(*arguments, features=features, plan=plan, beyond="window"))

    def _decoding(self, rows: int, capacity: int, params: SamplingParams) -> tuple[DecodeState, PageTables, SamplingRows, SamplingFeatures]:
        shape = self._shape(rows, capacity)
        ints = self._rows(rows)
        state = DecodeState(self._cache(shape), ints, ints, ints, self._rows(rows, dtype=jnp.bool_), None)
        every = [params] * rows
        settings = sampling_rows(every, [0] * rows, [[]] * rows, self._placement.config.vocab_size)
        return state, shape.identity_tables(self._placement.config, range(rows)), settings, batch_features(every)

    def prefill(self, tokens: int, cached: int, capacity: int, params: SamplingParams, variant: Variant | None = None) -> CompiledProgram:
        """The prefill program for one piece of ``tokens`` tokens of a single sequence, behind ``cached`` ones.

        ``variant``: the ring to use, instead of the one that Algorithm 5 chooses.
        """
        B = self._placement.spec.data
        shape = self._shape(B, capacity)
        every = [params] * B
        settings = sampling_rows(every, [0] * B, [[]] * B, self._placement.config.vocab_size)
        tables = shape.identity_tables(self._placement.config, [0] * B)
        layout, spread = Spreader(self._placement, self._dtype).spread(np.full(B, cached), np.full(B, tokens), tokens, tables)
        if spread is not None and variant is not None:
            spread = dataclasses.replace(spread, variant=variant)
        inputs = (self._rows(B, tokens), self._rows(B), self._rows(B), tables, layout, settings, None)
        features = batch_features(every)
        return self._compiled(self._programs.prefill.lower(self._leaves, self._cache(shape), *inputs, features=features, spread=spread))

    def cache_bytes(self, rows: int, capacity: int) -> int:
        """Bytes of the cache on each device."""
        shape = self._shape(rows, capacity)
        return shape.device_nbytes(self._placement.config, self._dtype, self._placement.array_sharding(*CACHE_AXES))

    def _shape(self, rows: int, capacity: int) -> CacheShape:
        return CacheShape(rows, capacity, self._placement.spec.token_ranks.count)

    def _rows(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._placement.array_sharding("batch"))

    def _cache(self, shape: CacheShape, config: ModelConfig | None = None) -> tuple[LayerCache, ...]:
        sharding = self._placement.array_sharding(*CACHE_AXES)
        shapes = shape.layer_shapes(config or self._placement.config)
        pools: list[Any] = [jax.ShapeDtypeStruct(pool, self._dtype, sharding=sharding) for pool in shapes]
        return tuple(LayerCache(pool, pool) for pool in pools)

    def _compiled(self, lowered: jax.stages.Lowered) -> CompiledProgram:
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return CompiledProgram(
            compiled.as_text() or "",
            self._placement.spec,
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.alias_size_in_bytes,
        )

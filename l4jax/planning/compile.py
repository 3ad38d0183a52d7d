"""Compiles programs at full size with abstract weights, and reads their costs off the result."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax.cache import CACHE_AXES, CacheShape, LayerCache, PageTables
from l4jax.config import DrafterConfig, ModelConfig
from l4jax.decoding.draft import DraftState
from l4jax.decoding.generate import BURST, DecodeState
from l4jax.decoding.params import SamplingParams
from l4jax.decoding.plan import Speculation
from l4jax.decoding.sampling import SamplingFeatures, SamplingRows, TokenCounts, batch_features, sampling_rows
from l4jax.decoding.speculate import SpeculationState
from l4jax.model.step import PieceLayout, Spread
from l4jax.parallel.placement import DrafterPlacement, Placement
from l4jax.parallel.spread import Spreader
from l4jax.planning.ledger import Collective, Ledger
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


@dataclasses.dataclass(frozen=True)
class Call:
    """A program and its arguments: abstract weights, caches and rows, and the small inputs that come from the host."""

    program: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    static: Mapping[str, Any]

    def lower(self) -> jax.stages.Lowered:
        """The program traced for these arguments."""
        return self.program.lower(*self.arguments, **self.static)

    @property
    def device_bytes(self) -> int:
        """Bytes of the arrays on each device; the small inputs from the host are left out."""
        abstract = [leaf for leaf in jax.tree.leaves(self.arguments) if isinstance(leaf, jax.ShapeDtypeStruct)]
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in abstract)


class AbstractModel:
    """A full-size model without values: only the shapes of its arrays exist, and its devices may be mere descriptions.

    ``decode``, ``speculate`` and ``prefill`` compile a program; ``decode_call``, ``speculate_call``, ``prefill_call`` and ``logits_call``
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
        self._leaves = self.programs.model.leaves(self.placement.abstract_weights(dtype))

    def decode(self, rows: int, capacity: int, params: SamplingParams) -> CompiledProgram:
        """The decode program for ``rows`` sequences of up to ``capacity`` tokens."""
        return self._compiled(self.decode_call(rows, capacity, params))

    def decode_call(self, rows: int, capacity: int, params: SamplingParams) -> Call:
        """As :meth:`decode`; arguments: leaves, state, tables, settings, steps."""
        state, tables, settings, features = self._decoding(rows, capacity, params)
        return Call(self.programs.decode, (self._leaves, state, tables, settings, np.int32(BURST)), {"features": features})

    def speculate(self, rows: int, capacity: int, params: SamplingParams, plan: Speculation) -> CompiledProgram:
        """The program that runs rounds of speculation with the model's drafter, for ``rows`` sequences of up to ``capacity`` tokens."""
        return self._compiled(self.speculate_call(rows, capacity, params, plan))

    def speculate_call(self, rows: int, capacity: int, params: SamplingParams, plan: Speculation) -> Call:
        """As :meth:`speculate`; arguments: leaves, the drafter's leaves, state, tables, the drafter's tables, settings, steps."""
        placement = self.draft_placement
        if placement is None:
            raise ValueError("the model has no drafter to speculate with; expected AbstractModel(..., drafter=...)")
        state, tables, settings, features = self._decoding(rows, capacity, params)
        shape = self._shape(rows, capacity)
        hidden_BD: Any = jax.ShapeDtypeStruct(
            (rows, placement.config.hidden_size), self._dtype, sharding=self.placement.array_sharding("batch")
        )
        draft = DraftState(self._cache(shape, placement.config), hidden_BD)
        leaves = self.programs.drafter.leaves(placement.abstract_weights(self._dtype))
        draft_tables = shape.identity_tables(placement.config, range(rows))
        arguments = (self._leaves, leaves, SpeculationState(state, draft), tables, draft_tables, settings, np.int32(BURST))
        return Call(self.programs.speculate, arguments, {"features": features, "plan": plan, "beyond": "window"})

    def prefill(self, tokens: int, cached: int, capacity: int, params: SamplingParams, variant: Variant | None = None) -> CompiledProgram:
        """The prefill program for one piece of ``tokens`` tokens of a single sequence, after ``cached`` ones.

        ``variant``: the ring to use, instead of the one that Algorithm 5 chooses.
        """
        return self._compiled(self.prefill_call(tokens, cached, capacity, params, variant))

    def prefill_call(self, tokens: int, cached: int, capacity: int, params: SamplingParams, variant: Variant | None = None) -> Call:
        """As :meth:`prefill`; arguments: leaves, cache, tokens, cached and new tokens of each row, tables, layout, settings, counts."""
        B = self.placement.spec.data
        shape, (inputs, layout, spread) = self._shape(B, capacity), self._piece(B, tokens, cached, capacity, variant)
        every = [params] * B
        settings = sampling_rows(every, [0] * B, [[]] * B, self.placement.config.vocab_size)
        static = {"features": batch_features(every), "spread": spread}
        return Call(self.programs.prefill, (self._leaves, self._cache(shape), *inputs, layout, settings, self._counts(every)), static)

    def logits_call(self, tokens: int, cached: int, capacity: int) -> Call:
        """The program that computes the logits at every token of such a piece; arguments: as :meth:`prefill_call`, up to the layout."""
        B = self.placement.spec.data
        inputs, layout, spread = self._piece(B, tokens, cached, capacity, None)
        arguments = (self._leaves, self._cache(self._shape(B, capacity)), *inputs, layout)
        return Call(self.programs.logits, arguments, {"spread": spread})

    def _piece(
        self, rows: int, tokens: int, cached: int, capacity: int, variant: Variant | None
    ) -> tuple[tuple[Any, ...], PieceLayout | None, Spread | None]:
        tables = self._shape(rows, capacity).identity_tables(self.placement.config, [0] * rows)
        layout, spread = Spreader(self.placement, self._dtype).spread(np.full(rows, cached), np.full(rows, tokens), tokens, tables)
        if spread is not None and variant is not None:
            spread = dataclasses.replace(spread, variant=variant)
        return (self._rows(rows, tokens), self._rows(rows), self._rows(rows), tables), layout, spread

    def _decoding(self, rows: int, capacity: int, params: SamplingParams) -> tuple[DecodeState, PageTables, SamplingRows, SamplingFeatures]:
        shape = self._shape(rows, capacity)
        ints, every = self._rows(rows), [params] * rows
        state = DecodeState(self._cache(shape), ints, ints, ints, self._rows(rows, dtype=jnp.bool_), self._counts(every))
        settings = sampling_rows(every, [0] * rows, [[]] * rows, self.placement.config.vocab_size)
        return state, shape.identity_tables(self.placement.config, range(rows)), settings, batch_features(every)

    def _counts(self, params: Sequence[SamplingParams]) -> TokenCounts | None:
        if not batch_features(params).adjusted:
            return None
        sharding = self.placement.array_sharding("batch", "vocab")
        shape = (len(params), self.placement.config.vocab_size)
        in_prompt_BV, output_BV = (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in (jnp.bool_, jnp.int32))
        return TokenCounts(in_prompt_BV, output_BV)  # type: ignore[arg-type] # shapes in the place of arrays

    def cache_bytes(self, rows: int, capacity: int) -> int:
        """Bytes of the cache on each device."""
        shape = self._shape(rows, capacity)
        return shape.device_nbytes(self.placement.config, self._dtype, self.placement.array_sharding(*CACHE_AXES))

    def _shape(self, rows: int, capacity: int) -> CacheShape:
        return CacheShape(rows, capacity, self.placement.spec.token_ranks.count)

    def _rows(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.placement.array_sharding("batch"))

    def _cache(self, shape: CacheShape, config: ModelConfig | None = None) -> tuple[LayerCache, ...]:
        sharding = self.placement.array_sharding(*CACHE_AXES)
        shapes = shape.layer_shapes(config or self.placement.config)
        pools: list[Any] = [jax.ShapeDtypeStruct(pool, self._dtype, sharding=sharding) for pool in shapes]
        return tuple(LayerCache(pool, pool) for pool in pools)

    def _compiled(self, call: Call) -> CompiledProgram:
        return CompiledProgram.of(call.lower().compile(), self.placement.spec)

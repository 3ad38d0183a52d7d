"""The programs' inputs, and how each array is sharded: weights, the state that stays on the devices, and a step's own inputs.

The ``specs`` of each class have its form, with a ``PartitionSpec`` in the place of each array or tree of arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int32

from l4jax.cache import CACHE_AXES, CacheShape, LayerCache, PageTables
from l4jax.decoding.params import SamplingParams
from l4jax.decoding.sampling import Logprobs, TokenCounts, mask_words, sampling_settings
from l4jax.decoding.slots import Slots, SlotTokens, SlotUpdate
from l4jax.model.steps.spread import PieceLayout
from l4jax.parallel.arrays import host_array
from l4jax.parallel.placement import DrafterPlacement, Placement
from sharding.mesh import MeshSpec
from sharding.rules import partition

Cache = tuple[LayerCache, ...]
Leaves = tuple[Array, ...]


def _row(spec: MeshSpec) -> Any:
    return partition(spec, "batch")


def _abstract_rows(placement: Placement, dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.array_sharding("batch"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """The flat weights of the model, and of its drafter, if there is one."""

    target: Leaves
    drafter: Leaves = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Resident:
    """The state that stays on the devices. It is donated to every program that changes it, and comes back.

    ``draft_cache`` has the drafter's keys and values of each token in ``cache``; it is empty without a drafter.
    """

    cache: Cache
    draft_cache: Cache
    slots: Slots

    @classmethod
    def specs(cls, spec: MeshSpec) -> Resident:
        """How it is sharded: pages over the data and token ranks, slots over the data ranks, heads and vocabulary over ``tensor``."""
        pools: Any = partition(spec, *CACHE_AXES)
        row, counts = _row(spec), cast(Any, partition(spec, "batch", "vocab"))
        slots = Slots(row, row, row, row, row, row, row, counts=TokenCounts(counts, counts), hidden_UD=row)
        return cls(pools, pools, slots)

    @classmethod
    def abstract(cls, placement: Placement, drafter: DrafterPlacement | None, shape: CacheShape, dtype: jnp.dtype) -> Resident:
        """Its shapes, dtypes and shardings for this many slots and pages."""
        spec = placement.spec
        U, V = shape.slots * spec.data, placement.config.vocab_size
        row, counts = placement.array_sharding("batch"), placement.array_sharding("batch", "vocab")
        pools = placement.array_sharding(*CACHE_AXES)

        def array(shape: Sequence[int], dtype: Any, sharding: Any) -> Any:
            return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)

        def cache(config: Any) -> Cache:
            return tuple(LayerCache(*[array(pool, dtype, pools)] * 2) for pool in shape.layer_shapes(config, spec))

        ints = array((U,), jnp.int32, row)
        settings = sampling_settings([SamplingParams()], [0], [[]], V)  # of one slot: there may be more than the host has memory for
        slots = Slots(
            token_U=ints,
            length_U=ints,
            produced_U=ints,
            done_U=array((U,), jnp.bool_, row),
            sampling=jax.tree.map(lambda leaf: array((U, *leaf.shape[1:]), leaf.dtype, row), settings),
            guided_U=array((U,), jnp.bool_, row),
            allowed_UW=array((U, mask_words(V)), jnp.uint32, row),
            counts=TokenCounts(array((U, V), jnp.bool_, counts), array((U, V), jnp.int32, counts)),
            hidden_UD=None if drafter is None else array((U, drafter.config.hidden_size), dtype, row),
        )
        return cls(cache(placement.config), () if drafter is None else cache(drafter.config), slots)

    @classmethod
    def empty(cls, abstract: Resident) -> Resident:
        """Allocate it, with every slot free.

        Caches are zeroed, because a masked key still multiplies its value: 0 x NaN would be NaN. All arrays are committed to their
        shardings, as a program's results are: otherwise programs would be compiled for both.
        """

        def allocate() -> Resident:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
            return dataclasses.replace(zeros, slots=dataclasses.replace(zeros.slots, done_U=~zeros.slots.done_U))

        return jax.jit(allocate, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of some rows' prefill: ``new_B[b]`` tokens that follow ``start_B[b]`` cached ones, padded.

    ``prompt_length_B``: as in :class:`SlotTokens`. ``ends_B``: whether the prefill ends with this piece, so that the next token is drawn.
    ``following_B``: the token after the piece, -1 where it is the one that is drawn. ``slot_B``: a number past the last slot for padding
    rows, which have no tokens. ``layout``: which token rank computes which positions; None if there is one rank.
    """

    token_BT: Int32[Array, "B T"]
    start_B: Int32[Array, "B"]
    new_B: Int32[Array, "B"]
    prompt_length_B: Int32[Array, "B"]
    ends_B: Bool[Array, "B"]
    following_B: Int32[Array, "B"]
    slot_B: Int32[Array, "B"]
    tables: PageTables
    draft_tables: PageTables | None
    layout: PieceLayout | None

    @classmethod
    def specs(cls, spec: MeshSpec) -> Piece:
        """How it is sharded: by rows."""
        row = _row(spec)
        positions: Any = PartitionSpec(None, *row)
        layout: Any = PieceLayout(positions, row) if spec.token_ranks.count > 1 else PartitionSpec()
        return cls(row, row, row, row, row, row, row, row, row, layout)

    @classmethod
    def abstract(cls, placement: Placement, length: int, tables: PageTables, layout: PieceLayout | None) -> Piece:
        """Shapes, dtypes and shardings for pieces of ``length`` tokens, with these tables and layout; without a drafter."""
        rows = len(tables.full_BW)
        ints, flags = _abstract_rows(placement, jnp.int32, rows), _abstract_rows(placement, jnp.bool_, rows)
        tokens = _abstract_rows(placement, jnp.int32, rows, length)
        return cls(tokens, ints, ints, ints, flags, ints, ints, tables, None, layout)

    @property
    def tokens(self) -> SlotTokens:
        """Its tokens, to count."""
        return SlotTokens(self.token_BT, self.start_B, self.new_B, self.prompt_length_B, self.slot_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FirstTokens:
    """What a piece returns for rows whose prefill ends with it: the next token, its log-probabilities, and whether it ends the answer.

    ``token_B`` is NOT_FINITE in every row whose logits at the piece's last token are not finite, whether its prefill ends or not.
    """

    token_B: Int32[Array, "B"]
    logprobs: Logprobs
    done_B: Bool[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Burst:
    """Which slots a burst decodes, in the order of the program's rows, and the pages that hold their keys.

    ``limit_B``: a row runs no token at this position or later; there it idles, but is not done. ``steps``: the most rounds, up to BURST.
    """

    slot_B: Int32[Array, "B"]
    limit_B: Int32[Array, "B"]
    tables: PageTables
    draft_tables: PageTables | None
    steps: Int32[Array, ""]

    @classmethod
    def specs(cls, spec: MeshSpec) -> Burst:
        """How it is sharded: by rows."""
        row, everywhere = _row(spec), cast(Any, PartitionSpec())
        return cls(row, row, row, row, everywhere)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotPages:
    """A slot and some pages of one data rank. There is a row for each data rank: the other ranks' rows, and padding, hold numbers past
    the last slot and page.
    """

    slot_B: Int32[Array, "B"]
    pages: PageTables

    @classmethod
    def specs(cls, spec: MeshSpec) -> SlotPages:
        """How it is sharded: over data ranks."""
        row = _row(spec)
        return cls(row, row)


def copy_specs(spec: MeshSpec) -> Resident:
    """How a copy of one slot and some pages is sharded: as on one data rank, and replicated over data ranks."""
    return Resident.specs(dataclasses.replace(spec, data=1))


def slot_update(
    slots: int,
    data: int,
    slot_b: Sequence[int],
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    stop_ids: Sequence[Sequence[int]],
    vocab_size: int,
) -> SlotUpdate:
    """An update of the slots ``slot_b``, of ``slots`` in all. Slots are numbered over all ``data`` ranks, which have equally many."""
    slots_a_rank = slots // data
    slot_U = np.full(slots, slots_a_rank, np.int32)
    slot_U[np.asarray(slot_b, int)] = np.asarray(slot_b, int) % slots_a_rank
    settings = sampling_settings(params, seeds, stop_ids, vocab_size)

    def scattered(values: Any) -> Any:
        of_slots = np.zeros((slots, *values.shape[1:]), values.dtype)
        of_slots[np.asarray(slot_b, int)] = values
        return host_array(of_slots, values.dtype)

    return SlotUpdate(host_array(slot_U, np.int32), jax.tree.map(scattered, settings))

"""What all layers of one step share: positions, which keys each new token attends, and where its own key is kept.

New tokens are either *replicated*: every token rank computes all of them (decoding; one device); or *spread*: each rank
computes some of them (prefill over several ranks). In both cases each rank caches a part of the keys: ``cache.rank_of``
says which part. Replicated tokens are consecutive, or the nodes of a draft tree.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from l4jax.cache import PAGE_SIZE, PageTables, rank_of, slot_of, slots_before
from l4jax.config import ModelConfig
from l4jax.model.rotary import rotary_angles
from sharding.layout import EMPTY
from sharding.ranks import ONE, Ranks
from sharding.select import Variant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyIntervals:
    """Consecutive replicated tokens: the keys that each attends in one kind of layer, and where that layer keeps its key.

    ``cached_start_BT``, ``cached_end_BT``: it attends this rank's cache slots [start, end). ``new_start_BT``, ``new_end_BT``: it
    attends the step's own tokens [start, end). ``slot_BT``: its key is written to this slot; -1 if this rank does not keep it.
    """

    cached_start_BT: Int32[Array, "B T"]
    cached_end_BT: Int32[Array, "B T"]
    new_start_BT: Int32[Array, "B T"]
    new_end_BT: Int32[Array, "B T"]
    slot_BT: Int32[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TreeKeys:
    """Nodes of a draft tree: the keys that each attends in one kind of layer. A node's key is not cached until it is accepted.

    ``cached_start_BN``, ``cached_end_BN``: a node attends this rank's cache slots [start, end). ``sees_BNS``: which of the tree's keys it
    attends; the keys of nodes from earlier passes come first, then those of this pass's nodes.
    """

    cached_start_BN: Int32[Array, "B N"]
    cached_end_BN: Int32[Array, "B N"]
    sees_BNS: Bool[Array, "B N S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedKeys:
    """Training's sequences, packed into rows: each token sees the first pass's keys [start, end).

    In later passes of an unrolled drafter a token also sees the keys of its own chain in the passes since (``model.packed``).
    """

    start_BT: Int32[Array, "B T"]
    end_BT: Int32[Array, "B T"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """How a piece of a prompt is spread over the ranks.

    ``variant``: what the ring passes. ``aligned``: no attention chunk of the piece is split between two ranks, or between a rank
    and the cache, so chunk-local layers pass nothing.
    """

    variant: Variant
    aligned: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PieceLayout:
    """Where a piece's tokens are: the position in each slot of each rank, ascending (``sharding.layout``).

    ``cached_BW``: the pages, on each rank, that hold the rows' cached tokens in the layers that keep everything.
    """

    position_RBT: Int32[Array, "R B T"]
    cached_BW: Int32[Array, "B W"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingKeys:
    """Spread tokens: the keys that the ring passes in one kind of layer, cached keys before new ones, and where new keys are kept.

    ``cached_BW``: the pages of cached keys that each rank passes around. ``key_position_RBS``: the position of every key of every rank.
    ``send_RBC``: the tokens that this rank sends to each rank, to be cached there; None if each rank keeps its own. ``slot_BA``: the
    slots of the keys that arrive, -1 for padding. ``window``: a query sees only this many of the last keys; None: all of them.
    """

    cached_BW: Int32[Array, "B W"]
    key_position_RBS: Int32[Array, "R B S"]
    send_RBC: Int32[Array, "R B C"] | None
    slot_BA: Int32[Array, "B A"]
    window: int | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """Rotation angles and query temperature of this rank's tokens, page tables, and the keys attended in each kind of layer.

    ``valid_BT`` is False for padding. For replicated tokens ``position_RBT`` is None, and ``full`` and ``local`` are
    :class:`KeyIntervals`, :class:`TreeKeys` or :class:`PackedKeys`; for spread tokens they are :class:`RingKeys`.
    """

    angles: tuple[Float32[Array, "B T r"], Float32[Array, "B T r"]]
    temperature_BT: Float32[Array, "B T"]
    valid_BT: Bool[Array, "B T"]
    full: KeyIntervals | TreeKeys | PackedKeys | RingKeys
    local: KeyIntervals | TreeKeys | PackedKeys | RingKeys
    tables: PageTables
    position_RBT: Int32[Array, "R B T"] | None


def full_intervals(
    start_B: Int32[Array, "B"], new_B: Int32[Array, "B"], T: int, ranks: Ranks = ONE, *, window: int | None = None
) -> KeyIntervals:
    """Causal attention: a token attends every cached token and the new ones up to itself; with ``window``, only the last that many."""
    index_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
    start_B1 = start_B[:, None]
    position_BT = start_B1 + index_1T
    rank = ranks.index()
    kept_BT = (index_1T < new_B[:, None]) & (rank_of(position_BT, ranks.count, None) == rank)
    first_BT = jnp.zeros_like(position_BT) if window is None else jnp.maximum(position_BT + 1 - window, 0)
    return KeyIntervals(
        cached_start_BT=slots_before(first_BT, rank, ranks.count),
        cached_end_BT=jnp.broadcast_to(slots_before(start_B1, rank, ranks.count), position_BT.shape),
        new_start_BT=jnp.maximum(first_BT - start_B1, 0),
        new_end_BT=jnp.broadcast_to(index_1T + 1, position_BT.shape),
        slot_BT=jnp.where(kept_BT, slot_of(position_BT, ranks.count, None), -1),
    )


def local_intervals(
    start_B: Int32[Array, "B"], new_B: Int32[Array, "B"], T: int, chunk: int, ranks: Ranks = ONE, *, window: int | None = None
) -> KeyIntervals:
    """Chunk-local causal attention: q sees k if ``k <= q`` and ``k // chunk == q // chunk``; with ``window``, also ``k > q - window``."""
    index_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
    start_B1 = start_B[:, None]
    position_BT = start_B1 + index_1T
    chunk_BT = position_BT // chunk
    first_BT = chunk_BT * chunk
    if window is not None:
        first_BT = jnp.maximum(first_BT, position_BT + 1 - window)
    mine_BT = rank_of(position_BT, ranks.count, chunk) == ranks.index()
    # Only tokens of the last new token's chunk are kept: an earlier chunk is never attended again, and its slots belong to
    # the later chunk.
    last_B1 = start_B1 + new_B[:, None] - 1
    kept_BT = (index_1T < new_B[:, None]) & (chunk_BT >= last_B1 // chunk) & mine_BT
    return KeyIntervals(
        cached_start_BT=first_BT - chunk_BT * chunk,
        cached_end_BT=jnp.where(mine_BT, jnp.maximum(start_B1 - chunk_BT * chunk, 0), 0),
        new_start_BT=jnp.maximum(first_BT - start_B1, 0),
        new_end_BT=jnp.broadcast_to(index_1T + 1, position_BT.shape),
        slot_BT=jnp.where(kept_BT, slot_of(position_BT, ranks.count, chunk), -1),
    )


def ring_keys(
    layout: PieceLayout, start_B: Int32[Array, "B"], tables: PageTables, ranks: Ranks, chunk: int | None, *, aligned: bool
) -> RingKeys:
    """Keys of the layers that keep everything, or with ``chunk`` of the chunk-local layers."""
    position_RBT = layout.position_RBT
    R, B, T = position_RBT.shape
    every_rank_R11 = jnp.arange(R, dtype=jnp.int32)[:, None, None]
    if chunk is None:
        cached_BW = layout.cached_BW
        slot_11S = jnp.arange(cached_BW.shape[1] * PAGE_SIZE, dtype=jnp.int32)[None, None]
        cached_RBS = (slot_11S // PAGE_SIZE * R + every_rank_R11) * PAGE_SIZE + slot_11S % PAGE_SIZE
        cached_RBS = jnp.where(cached_RBS < start_B[None, :, None], cached_RBS, EMPTY)
        kept_RBT = position_RBT != EMPTY
        # A rank's tokens are two runs of positions. Of the pages that a run touches, every R-th belongs to the same rank.
        capacity = min(T, (-(-T // PAGE_SIZE) + 3 + 2 * (R - 1)) // R * PAGE_SIZE)
    else:
        # Without cached tokens there is no partly cached chunk either.
        cached_BW = tables.local_Bw if layout.cached_BW.shape[1] > 0 and not aligned else tables.local_Bw[:, :0]
        slot_11S = jnp.arange(cached_BW.shape[1] * PAGE_SIZE, dtype=jnp.int32)[None, None]
        chunk_start_1B1 = (start_B // chunk * chunk)[None, :, None]
        present = (chunk_start_1B1 + slot_11S < start_B[None, :, None]) & (chunk_start_1B1 // chunk % R == every_rank_R11)
        cached_RBS = jnp.where(present, chunk_start_1B1 + slot_11S, EMPTY)
        last_1B1 = jnp.max(position_RBT, axis=(0, 2))[None, :, None]
        kept_RBT = (position_RBT != EMPTY) & (position_RBT // chunk == last_1B1 // chunk)
        capacity = min(T, chunk)
    key_position_RBS = jnp.concatenate([jnp.broadcast_to(cached_RBS, (R, B, cached_RBS.shape[2])), position_RBT], axis=2)
    rank = ranks.index()
    if chunk is not None and aligned:  # the layout has put the last chunk on the rank that caches it
        slot_BT = jnp.where(kept_RBT[rank], slot_of(position_RBT[rank], R, chunk), -1)
        return RingKeys(cached_BW, key_position_RBS, None, slot_BT)
    owner_RBT = jnp.where(kept_RBT, rank_of(position_RBT, R, chunk), -1)
    send_RBC, _ = _first(owner_RBT[rank][None] == every_rank_R11, capacity)
    index_RBC, present_RBC = _first(owner_RBT == rank, capacity)
    arriving_RBC = jnp.where(present_RBC, jnp.take_along_axis(position_RBT, index_RBC, axis=2), EMPTY)
    arriving_BA = jnp.swapaxes(arriving_RBC, 0, 1).reshape(B, -1)
    slot_BA = jnp.where(arriving_BA != EMPTY, slot_of(arriving_BA, R, chunk), -1)
    return RingKeys(cached_BW, key_position_RBS, send_RBC, slot_BA)


def _first(mask_RBT: Array, count: int) -> tuple[Array, Array]:
    """Indices of the first ``count`` true entries along the last axis, and which of these indices are of true entries."""
    index_RBC = jnp.argsort(~mask_RBT, axis=-1, stable=True)[..., :count].astype(jnp.int32)
    return index_RBC, jnp.take_along_axis(mask_RBT, index_RBC, axis=-1)


def attention_temperature(config: ModelConfig, position_BT: Int32[Array, "B T"]) -> Float32[Array, "B T"]:
    """Query scale of the NoPE layers: ``1 + attn_scale * ln(floor((position + 1) / floor_scale) + 1)``.

    The floor is an integer division: computed in bfloat16 it is wrong from position 8176 on. (Scalable-Softmax, arXiv 2501.19399.)
    """
    bucket = (position_BT + 1) // config.floor_scale
    return 1.0 + config.attn_scale * jnp.log(bucket.astype(jnp.float32) + 1.0)


def step_inputs(
    config: ModelConfig,
    start_B: Int32[Array, "B"],
    new_B: Int32[Array, "B"],
    T: int,
    tables: PageTables,
    ranks: Ranks = ONE,
    *,
    window: int | None = None,
) -> StepInputs:
    """Inputs for ``new_B[b]`` replicated tokens (padded to T) that follow the ``start_B[b]`` cached tokens in row ``b``.

    ``window`` is as in :func:`full_intervals`.
    """
    index_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
    position_BT = start_B[:, None] + index_1T
    full = full_intervals(start_B, new_B, T, ranks, window=window)
    chunk = config.attention_chunk_size
    local = full if chunk is None else local_intervals(start_B, new_B, T, chunk, ranks, window=window)
    angles, temperature_BT = rotary_angles(config, position_BT), attention_temperature(config, position_BT)
    return StepInputs(angles, temperature_BT, index_1T < new_B[:, None], full, local, tables, None)


def tree_step_inputs(
    config: ModelConfig,
    start_B: Int32[Array, "B"],
    depth_BN: Int32[Array, "B N"],
    valid_BN: Bool[Array, "B N"],
    sees_BNS: Bool[Array, "B N S"],
    tables: PageTables,
    ranks: Ranks = ONE,
    *,
    window: int | None = None,
) -> StepInputs:
    """Inputs for nodes of draft trees; node ``n`` of row ``b`` is at position ``start_B[b] + depth_BN[b, n]``, after the cached tokens.

    Valid nodes must be in the attention chunk of position ``start_B[b]``; ``window`` is as in :func:`full_intervals`.
    """
    position_BN = start_B[:, None] + depth_BN
    # Every rank has the nodes' keys. Only rank 0 attends to them, so that they enter the merged result once.
    sees_BNS = sees_BNS & (ranks.index() == 0)

    def keys(chunk: int | None) -> TreeKeys:
        one_B = jnp.ones_like(start_B)
        of_root = full_intervals(start_B, one_B, 1, ranks) if chunk is None else local_intervals(start_B, one_B, 1, chunk, ranks)
        first_BN = jnp.zeros_like(position_BN)
        if window is not None:
            chunk_start_B = jnp.zeros_like(start_B) if chunk is None else start_B // chunk * chunk
            first_BN = jnp.maximum(position_BN + 1 - window - chunk_start_B[:, None], 0)
            first_BN = slots_before(first_BN, ranks.index(), ranks.count) if chunk is None else first_BN
        return TreeKeys(first_BN, jnp.broadcast_to(of_root.cached_end_BT, position_BN.shape), sees_BNS)

    full, chunk = keys(None), config.attention_chunk_size
    angles, temperature_BN = rotary_angles(config, position_BN), attention_temperature(config, position_BN)
    return StepInputs(angles, temperature_BN, valid_BN, full, full if chunk is None else keys(chunk), tables, None)


def packed_step_inputs(config: ModelConfig, first_BT: Int32[Array, "B T"], passes: int = 0) -> StepInputs:
    """Inputs for sequences packed into rows, without a cache; ``first_BT``: where in its row each token's sequence begins.

    ``passes``: the number of passes that an unrolled drafter has already made over the same tokens.
    """
    B, T = first_BT.shape
    index_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
    position_BT = index_1T - first_BT
    end_BT = jnp.broadcast_to(index_1T + 1 - passes, (B, T))
    full, chunk = PackedKeys(first_BT, end_BT), config.attention_chunk_size
    local = full if chunk is None else PackedKeys(first_BT + position_BT // chunk * chunk, end_BT)
    angles, temperature_BT = rotary_angles(config, position_BT), attention_temperature(config, position_BT)
    no_pages = jnp.zeros((B, 0), jnp.int32)
    return StepInputs(angles, temperature_BT, jnp.ones((B, T), bool), full, local, PageTables(no_pages, no_pages), None)


def spread_step_inputs(
    config: ModelConfig,
    layout: PieceLayout,
    start_B: Int32[Array, "B"],
    tables: PageTables,
    ranks: Ranks,
    *,
    aligned: bool,
    window: int | None = None,
) -> StepInputs:
    """Inputs for tokens that are spread over ranks and follow the ``start_B[b]`` cached tokens in row ``b``.

    ``window`` is as in :func:`full_intervals`.
    """
    position_BT = layout.position_RBT[ranks.index()]
    chunk = config.attention_chunk_size

    def keys(chunk: int | None) -> RingKeys:
        return dataclasses.replace(ring_keys(layout, start_B, tables, ranks, chunk, aligned=aligned), window=window)

    full = keys(None)
    local = full if chunk is None else keys(chunk)
    angles, temperature_BT = rotary_angles(config, position_BT), attention_temperature(config, position_BT)
    return StepInputs(angles, temperature_BT, position_BT != EMPTY, full, local, tables, layout.position_RBT)


def tokens_at(token_BT: Int32[Array, "B T"], position_Bt: Int32[Array, "B t"], start_B: Int32[Array, "B"]) -> Int32[Array, "B t"]:
    """Pick a rank's tokens, those at ``position_Bt``, from the tokens of the whole piece."""
    return jnp.take_along_axis(token_BT, jnp.clip(position_Bt - start_B[:, None], 0, token_BT.shape[1] - 1), axis=1)


def last_state(
    x_BTD: Float[Array, "B T D"], start_B: Int32[Array, "B"], new_B: Int32[Array, "B"], layout: PieceLayout | None, ranks: Ranks
) -> Float[Array, "B D"]:
    """The state of each row's last new token, on every rank; with a layout, zeros for a row without new tokens."""
    if layout is None:
        return jnp.take_along_axis(x_BTD, jnp.maximum(new_B - 1, 0)[:, None, None], axis=1)[:, 0]
    here_BT = layout.position_RBT[ranks.index()] == (start_B + new_B - 1)[:, None]
    index_B = jnp.argmax(here_BT, axis=1)
    x_BD = jnp.take_along_axis(x_BTD, index_B[:, None, None], axis=1)[:, 0]
    return ranks.sum(jnp.where(jnp.any(here_BT, axis=1)[:, None], x_BD, jnp.zeros((), x_BD.dtype)))

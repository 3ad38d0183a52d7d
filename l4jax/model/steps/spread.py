"""Tokens that are spread over the token ranks: prefill over several of them, by ring attention."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from l4jax.cache import PAGE_SIZE, LayerCache, PageTables, rank_of, read, slot_of, write
from l4jax.config import ModelConfig
from l4jax.model.steps.inputs import Keys, StepInputs
from l4jax.model.steps.replicated import before_write
from pallas_kernels.heads import Heads, split_heads
from sharding.layout import EMPTY
from sharding.ranks import Ranks
from sharding.ring import attend_positions, pass_kv, pass_q
from sharding.select import Variant


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
class RingKeys(Keys):
    """The keys that the ring passes in one kind of layer, cached keys before new ones, and where new keys are kept.

    ``position_RBT``: as in :class:`PieceLayout`. ``cached_BW``: the pages of cached keys that each rank passes around.
    ``key_position_RBS``: the position of every key of every rank. ``pages_BW``: this rank's pages. ``send_RBC``: the tokens that this rank
    sends to each rank, to be cached there; None if each rank keeps its own. ``slot_BA``: the slots of the keys that arrive, -1 for padding.
    ``chunk``: of a chunk-local layer. ``window``: a query sees only this many of the last keys; None: all of them.
    """

    position_RBT: Int32[Array, "R B T"]
    cached_BW: Int32[Array, "B W"]
    key_position_RBS: Int32[Array, "R B S"]
    pages_BW: Int32[Array, "B _"]
    send_RBC: Int32[Array, "R B C"] | None
    slot_BA: Int32[Array, "B A"]
    spread: Spread = dataclasses.field(metadata={"static": True})
    chunk: int | None = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(metadata={"static": True})

    def attend(
        self,
        heads: Heads,
        cache: LayerCache,
        ranks: Ranks,
        *,
        scale: float,
    ) -> tuple[Float[Array, "B T K G h"], LayerCache]:
        """Each rank has some of the new tokens and its own part of the cached keys."""
        q_BTKGh, k_BTKh, v_BTKh = split_heads(heads)
        attended_BTKGh = self._ring(q_BTKGh, k_BTKh, v_BTKh, cache, ranks, scale).astype(q_BTKGh.dtype)
        attended_BTKGh, k_BTKh, v_BTKh = before_write(attended_BTKGh, k_BTKh, v_BTKh)
        if self.send_RBC is not None:
            k_BTKh, v_BTKh = _exchange(k_BTKh, v_BTKh, self.send_RBC, ranks)
        return attended_BTKGh, write(cache, k_BTKh, v_BTKh, self.pages_BW, self.slot_BA)

    def _ring(self, q_BTKGh: Array, k_BTKh: Array, v_BTKh: Array, cache: LayerCache, ranks: Ranks, scale: float) -> Array:
        if self.chunk is not None and self.spread.aligned:
            position_BT = self.position_RBT[ranks.index()]
            kv_2BTKh = jnp.stack([k_BTKh, v_BTKh])
            return attend_positions(q_BTKGh, kv_2BTKh, position_BT, position_BT, self.chunk, self.window, scale=scale)[0]
        segments: tuple[int, ...] = (k_BTKh.shape[1],)
        if self.cached_BW.shape[1] > 0:
            cached_k_BSKh, cached_v_BSKh = read(cache, self.cached_BW)
            segments = (cached_k_BSKh.shape[1], *segments)
            k_BTKh, v_BTKh = jnp.concatenate([cached_k_BSKh, k_BTKh], axis=1), jnp.concatenate([cached_v_BSKh, v_BTKh], axis=1)
        ring = pass_kv if self.spread.variant == "pass_kv" else pass_q
        return ring(
            q_BTKGh,
            k_BTKh,
            v_BTKh,
            self.position_RBT,
            self.key_position_RBS,
            axis_name=ranks.axes,
            scale=scale,
            chunk=self.chunk,
            window=self.window,
            segments=segments,
        )[0]


def _exchange(k_BTKh: Array, v_BTKh: Array, send_RBC: Array, ranks: Ranks) -> tuple[Array, Array]:
    """Send new keys and values to the ranks that cache them; returns those that arrive here, [B, A, K, h] each."""
    kv_BT2Kh = jnp.stack([k_BTKh, v_BTKh], axis=2)
    leaving = jax.vmap(lambda index_BC: jnp.take_along_axis(kv_BT2Kh, index_BC[:, :, None, None, None], axis=1))(send_RBC)
    arriving = jax.lax.all_to_all(leaving, ranks.axes, split_axis=0, concat_axis=0)
    R, B, C, _, K, h = arriving.shape
    kv_BA2Kh = jnp.swapaxes(arriving, 0, 1).reshape(B, R * C, 2, K, h)
    return kv_BA2Kh[:, :, 0], kv_BA2Kh[:, :, 1]


def ring_keys(
    layout: PieceLayout,
    spread: Spread,
    start_B: Int32[Array, "B"],
    tables: PageTables,
    ranks: Ranks,
    chunk: int | None,
    window: int | None,
) -> RingKeys:
    """Keys of the layers that keep everything, or with ``chunk`` of the chunk-local layers."""
    position_RBT = layout.position_RBT
    R, B, T = position_RBT.shape
    every_rank_R11 = jnp.arange(R, dtype=jnp.int32)[:, None, None]
    pages_BW = tables.full_BW if chunk is None else tables.local_Bw
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
        cached_BW = tables.local_Bw if layout.cached_BW.shape[1] > 0 and not spread.aligned else tables.local_Bw[:, :0]
        slot_11S = jnp.arange(cached_BW.shape[1] * PAGE_SIZE, dtype=jnp.int32)[None, None]
        chunk_start_1B1 = (start_B // chunk * chunk)[None, :, None]
        present = (chunk_start_1B1 + slot_11S < start_B[None, :, None]) & (chunk_start_1B1 // chunk % R == every_rank_R11)
        cached_RBS = jnp.where(present, chunk_start_1B1 + slot_11S, EMPTY)
        last_1B1 = jnp.max(position_RBT, axis=(0, 2))[None, :, None]
        kept_RBT = (position_RBT != EMPTY) & (position_RBT // chunk == last_1B1 // chunk)
        capacity = min(T, chunk)
    key_position_RBS = jnp.concatenate([jnp.broadcast_to(cached_RBS, (R, B, cached_RBS.shape[2])), position_RBT], axis=2)
    rank = ranks.index()
    if chunk is not None and spread.aligned:  # the layout has put the last chunk on the rank that caches it
        slot_BT = jnp.where(kept_RBT[rank], slot_of(position_RBT[rank], R, chunk), -1)
        return RingKeys(position_RBT, cached_BW, key_position_RBS, pages_BW, None, slot_BT, spread, chunk, window)
    owner_RBT = jnp.where(kept_RBT, rank_of(position_RBT, R, chunk), -1)
    send_RBC, _ = _first(owner_RBT[rank][None] == every_rank_R11, capacity)
    index_RBC, present_RBC = _first(owner_RBT == rank, capacity)
    arriving_RBC = jnp.where(present_RBC, jnp.take_along_axis(position_RBT, index_RBC, axis=2), EMPTY)
    arriving_BA = jnp.swapaxes(arriving_RBC, 0, 1).reshape(B, -1)
    slot_BA = jnp.where(arriving_BA != EMPTY, slot_of(arriving_BA, R, chunk), -1)
    return RingKeys(position_RBT, cached_BW, key_position_RBS, pages_BW, send_RBC, slot_BA, spread, chunk, window)


def _first(mask_RBT: Array, count: int) -> tuple[Array, Array]:
    """Indices of the first ``count`` true entries along the last axis, and which of these indices are of true entries."""
    index_RBC = jnp.argsort(~mask_RBT, axis=-1, stable=True)[..., :count].astype(jnp.int32)
    return index_RBC, jnp.take_along_axis(mask_RBT, index_RBC, axis=-1)


def spread_step(
    config: ModelConfig,
    layout: PieceLayout,
    spread: Spread,
    start_B: Int32[Array, "B"],
    tables: PageTables,
    ranks: Ranks,
    *,
    window: int | None = None,
) -> StepInputs:
    """Inputs for tokens that are spread over ranks and follow the ``start_B[b]`` cached tokens in row ``b``.

    ``window`` is as in :func:`l4jax.model.steps.replicated.full_intervals`.
    """
    position_BT, chunk = layout.position_RBT[ranks.index()], config.attention_chunk_size
    full = local = ring_keys(layout, spread, start_B, tables, ranks, None, window)
    if chunk is not None:
        local = ring_keys(layout, spread, start_B, tables, ranks, chunk, window)
    return StepInputs.at(config, position_BT, position_BT != EMPTY, full, local, spread=True)


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

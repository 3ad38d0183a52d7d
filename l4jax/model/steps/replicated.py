"""Consecutive tokens that every token rank computes: decoding, and prefill on one rank."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from l4jax.cache import LayerCache, PageTables, rank_of, slot_of, slots_before, targets, write
from l4jax.config import ModelConfig
from l4jax.model.steps.inputs import Keys, StepInputs
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention.blocks import inside
from pallas_kernels.heads import Heads, split_heads, write_heads
from pallas_kernels.keys import Interval, NewKeys, PagedKeys, TreeKeys
from pallas_kernels.merge import Partial, merge_attention
from pallas_kernels.tree_attention import tree_attention
from sharding.ranks import ONE, Ranks

FEW_TOKENS = 16
"""Up to as many tokens are attended as the nodes of a tree: its kernels divide the cached keys among a GPU's multiprocessors."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyIntervals:
    """Which keys each token attends: this rank's cache slots ``cached``, and the step's own tokens ``new``.

    ``slot_BT``: its own key is written to this slot; -1 if this rank does not keep it.
    """

    cached: Interval
    new: Interval
    slot_BT: Int32[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReplicatedKeys(Keys):
    """The keys in one kind of layer. ``apart``: as in :class:`l4jax.cache.PageTables`."""

    intervals: KeyIntervals
    pages_BW: Int32[Array, "B W"]
    apart: bool = dataclasses.field(metadata={"static": True})

    def attend(
        self,
        heads: Heads,
        cache: LayerCache,
        ranks: Ranks,
        *,
        scale: float,
    ) -> tuple[Float[Array, "B T K G h"], LayerCache]:
        """Every rank has all new tokens and its own part of the cached keys."""
        if heads.qkv_BTKgh.shape[1] == 1:
            return self._attend_one(heads, cache, ranks, scale)
        q_BTKGh, k_BTKh, v_BTKh = split_heads(heads)
        prefix = PagedKeys(cache.k_PKph, cache.v_PKph, self.pages_BW, self.intervals.cached)
        # Every rank has the new tokens' keys. Only rank 0 attends to them, so that they enter the merged result once.
        start_BT, end_BT = self.intervals.new.start_BT, jnp.where(ranks.index() == 0, self.intervals.new.end_BT, 0)
        T = q_BTKGh.shape[1]
        if T <= FEW_TOKENS:
            tokens = TreeKeys(k_BTKh, v_BTKh, inside(start_BT, end_BT, jnp.int32(0), T))
            partial = tree_attention(q_BTKGh, tokens, prefix, scale=scale, apart=self.apart, dtype=attention_dtype(ranks, q_BTKGh))
        else:
            new = NewKeys(k_BTKh, v_BTKh, Interval(start_BT, end_BT))
            partial = flash_attention(q_BTKGh, new, prefix, scale=scale, apart=self.apart)
        attended_BTKGh = merge_over(ranks, partial).astype(q_BTKGh.dtype)
        attended_BTKGh, k_BTKh, v_BTKh = before_write(attended_BTKGh, k_BTKh, v_BTKh)
        return attended_BTKGh, write(cache, k_BTKh, v_BTKh, self.pages_BW, self.intervals.slot_BT)

    def _attend_one(self, heads: Heads, cache: LayerCache, ranks: Ranks, scale: float) -> tuple[Array, LayerCache]:
        """Write each row's one new token to the cache, in the slot after the keys that it sees; then attend them all at once."""
        cached, slot_BT = self.intervals.cached, self.intervals.slot_BT
        q_BTKGh, cache = write_heads(heads, cache, targets(cache, self.pages_BW, slot_BT))
        seen = Interval(cached.start_BT, jnp.where(slot_BT >= 0, slot_BT + 1, cached.end_BT))
        prefix = PagedKeys(cache.k_PKph, cache.v_PKph, self.pages_BW, seen)
        partial = tree_attention(q_BTKGh, None, prefix, scale=scale, apart=self.apart, dtype=attention_dtype(ranks, q_BTKGh))
        return merge_over(ranks, partial).astype(q_BTKGh.dtype), cache


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
        cached=Interval(
            slots_before(first_BT, rank, ranks.count), jnp.broadcast_to(slots_before(start_B1, rank, ranks.count), position_BT.shape)
        ),
        new=Interval(jnp.maximum(first_BT - start_B1, 0), jnp.broadcast_to(index_1T + 1, position_BT.shape)),
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
        cached=Interval(first_BT - chunk_BT * chunk, jnp.where(mine_BT, jnp.maximum(start_B1 - chunk_BT * chunk, 0), 0)),
        new=Interval(jnp.maximum(first_BT - start_B1, 0), jnp.broadcast_to(index_1T + 1, position_BT.shape)),
        slot_BT=jnp.where(kept_BT, slot_of(position_BT, ranks.count, chunk), -1),
    )


def replicated_step(
    config: ModelConfig,
    start_B: Int32[Array, "B"],
    new_B: Int32[Array, "B"],
    T: int,
    tables: PageTables,
    ranks: Ranks = ONE,
    *,
    window: int | None = None,
) -> StepInputs:
    """Inputs for ``new_B[b]`` tokens (padded to T) that follow the ``start_B[b]`` cached tokens in row ``b``.

    ``window`` is as in :func:`full_intervals`.
    """
    index_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
    chunk, apart = config.attention_chunk_size, tables.rows_apart
    full = local = ReplicatedKeys(full_intervals(start_B, new_B, T, ranks, window=window), tables.full_BW, apart)
    if chunk is not None:
        local = ReplicatedKeys(local_intervals(start_B, new_B, T, chunk, ranks, window=window), tables.local_Bw, apart)
    return StepInputs.at(config, start_B[:, None] + index_1T, index_1T < new_B[:, None], full, local)


def attention_dtype(ranks: Ranks, q_BTKGh: Float[Array, "B T K G h"]) -> jnp.dtype | None:
    """The dtype in which a rank's attention is wanted: the queries'; None, unrounded, if other ranks' are merged with it."""
    return q_BTKGh.dtype if ranks.count == 1 else None


def merge_over(ranks: Ranks, partial: Partial) -> Float[Array, "B T K G h"]:
    """Merge every rank's partial attention."""
    if ranks.count == 1:
        return partial[0]
    # Output and log-sum-exp are gathered in one message.
    gathered = ranks.gather(jnp.concatenate([partial[0], partial[1][..., None]], axis=-1))
    return merge_attention([(part[..., :-1], part[..., -1]) for part in gathered])[0]


def before_write(attended_BTKGh: Array, k_BTKh: Array, v_BTKh: Array) -> tuple[Array, Array, Array]:
    """Return them unchanged, so that the cache's pages are read before these keys and values overwrite them.

    Because this makes it a data dependence, XLA writes in place.
    """
    return jax.lax.optimization_barrier((attended_BTKGh, k_BTKh, v_BTKh))

"""Attention without a KV cache, for training: over sequences packed into rows, and over an unrolled drafter's passes.

A drafter is trained on what it will read: in pass 0 the target's hidden states, in later passes its own output of the pass before, one
position on (EAGLE-3's training-time test, arXiv 2503.01840). The entry of pass i at position t is the i-th draft of a chain that starts
after the true entry at t - i, which pass 0 computed. So it sees pass 0's keys up to t - i, then the keys of its own chain: those of
pass j at t - (i - j).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from l4jax.config import ModelConfig
from l4jax.model.steps.inputs import Keys, StepInputs
from pallas_kernels.flash_attention.blocks import inside
from pallas_kernels.heads import Heads, split_heads
from pallas_kernels.keys import Interval
from sharding.ranks import Ranks


@dataclasses.dataclass(frozen=True)
class PackedCache:
    """One layer's keys and values, one entry for each pass so far."""

    k_BTKh: tuple[Float[Array, "B T K h"], ...] = ()
    v_BTKh: tuple[Float[Array, "B T K h"], ...] = ()

    def extended(self, k_BTKh: Float[Array, "B T K h"], v_BTKh: Float[Array, "B T K h"]) -> PackedCache:
        """Append another pass's keys and values."""
        return PackedCache((*self.k_BTKh, k_BTKh), (*self.v_BTKh, v_BTKh))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedKeys(Keys):
    """The first pass's keys that each token sees. In later passes it also sees the keys of its own chain in the passes since."""

    first_pass: Interval

    def attend(
        self,
        heads: Heads,
        cache: PackedCache,
        ranks: Ranks,
        *,
        scale: float,
    ) -> tuple[Float[Array, "B T K G h"], PackedCache]:
        """On one token rank."""
        assert ranks.count == 1
        q_BTKGh, k_BTKh, v_BTKh = split_heads(heads, implementation="xla")  # the Hopper kernel has no gradient
        cache = cache.extended(k_BTKh, v_BTKh)
        return _attend(q_BTKGh, cache, self.first_pass, scale).astype(q_BTKGh.dtype), cache


def packed_step(config: ModelConfig, first_BT: Int32[Array, "B T"], passes: int = 0) -> StepInputs:
    """Inputs for sequences packed into rows, without a cache; ``first_BT``: where in its row each token's sequence begins.

    ``passes``: the number of passes that an unrolled drafter has already made over the same tokens.
    """
    B, T = first_BT.shape
    index_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
    position_BT = index_1T - first_BT
    end_BT = jnp.broadcast_to(index_1T + 1 - passes, (B, T))
    full, chunk = PackedKeys(Interval(first_BT, end_BT)), config.attention_chunk_size
    local = full if chunk is None else PackedKeys(Interval(first_BT + position_BT // chunk * chunk, end_BT))
    return StepInputs.at(config, position_BT, jnp.ones((B, T), bool), full, local)


_BLOCKS = 4
"""Blocks that a row's queries are cut into. No scores are computed for keys after a block's end, so more blocks waste less."""


def _attend(q_BTKGh: Array, cache: PackedCache, interval: Interval, scale: float) -> Float[Array, "B T K G h"]:
    """Attention of the last pass's queries; scores are multiplied by ``scale``."""
    T, last = q_BTKGh.shape[1], len(cache.k_BTKh) - 1
    chain_k, chain_v = ([shifted(x_BTKh, j - last) for j, x_BTKh in enumerate(of)][1:] for of in (cache.k_BTKh, cache.v_BTKh))
    size = -(-T // _BLOCKS)
    blocks = []
    for begin in range(0, T, size):
        # No query of a block sees keys after the block's last query.
        end = min(begin + size, T)
        mine = slice(begin, end)
        inside_BTS = inside(interval.start_BT[:, mine], interval.end_BT[:, mine], jnp.int32(0), end)
        first = (cache.k_BTKh[0][:, :end], cache.v_BTKh[0][:, :end])
        chain = [(k_BTKh[:, mine], v_BTKh[:, mine]) for k_BTKh, v_BTKh in zip(chain_k, chain_v, strict=True)]
        blocks.append(_attend_block(q_BTKGh[:, mine], first, inside_BTS, chain, scale))
    return jnp.concatenate(blocks, axis=1)


def _attend_block(
    q_BTKGh: Array, first: tuple[Array, Array], inside_BTS: Array, chain: Sequence[tuple[Array, Array]], scale: float
) -> Float[Array, "B T K G h"]:
    """Attention over the first pass's keys that ``inside_BTS`` marks, and over the keys of each query's own chain in later passes."""
    # One softmax, not a merge of two: a query that sees no key of the first pass still sees itself, so no gradient is 0 / 0.
    k_BSKh, v_BSKh = first
    first_BKGTS = scale * jnp.einsum("btkgh,bskh->bkgts", q_BTKGh, k_BSKh, preferred_element_type=jnp.float32)
    first_BKGTS = jnp.where(inside_BTS[:, None, None], first_BKGTS, -jnp.inf)
    scores = [scale * jnp.einsum("btkgh,btkh->bkgt", q_BTKGh, k_BTKh, preferred_element_type=jnp.float32) for k_BTKh, _ in chain]
    highest_BKGT = jnp.max(first_BKGTS, axis=-1)
    for score_BKGT in scores:
        highest_BKGT = jnp.maximum(highest_BKGT, score_BKGT)
    highest_BKGT = jax.lax.stop_gradient(highest_BKGT)
    weight_BKGTS = jnp.exp(first_BKGTS - highest_BKGT[..., None])
    total_BKGT = jnp.sum(weight_BKGTS, axis=-1)
    out_BTKGh = jnp.einsum("bkgts,bskh->btkgh", weight_BKGTS.astype(v_BSKh.dtype), v_BSKh, preferred_element_type=jnp.float32)
    for score_BKGT, (_, v_BTKh) in zip(scores, chain, strict=True):
        weight_BKGT = jnp.exp(score_BKGT - highest_BKGT)
        total_BKGT = total_BKGT + weight_BKGT
        out_BTKGh = out_BTKGh + jnp.einsum("bkgt,btkh->btkgh", weight_BKGT.astype(v_BTKh.dtype), v_BTKh, preferred_element_type=jnp.float32)
    return out_BTKGh / jnp.moveaxis(total_BKGT, 3, 1)[..., None]


def shifted(x: Shaped[Array, "B T ..."], by: int) -> Shaped[Array, "B T ..."]:
    """Give each position the value ``by`` positions later in its row; zeros (False) where that is beyond the row's ends."""
    if by == 0:
        return x
    nothing = jnp.zeros_like(x[:, : min(abs(by), x.shape[1])])
    return jnp.concatenate([x[:, by:], nothing] if by > 0 else [nothing, x[:, :by]], axis=1)

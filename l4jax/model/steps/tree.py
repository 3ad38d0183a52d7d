"""The nodes of a draft tree, which every token rank computes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from l4jax.cache import PageTables, TreeCache, slots_before
from l4jax.config import ModelConfig
from l4jax.model.steps.inputs import Keys, StepInputs
from l4jax.model.steps.replicated import attention_dtype, full_intervals, local_intervals, merge_over
from pallas_kernels.heads import Heads, split_heads
from pallas_kernels.keys import Interval, PagedKeys, TreeKeys
from pallas_kernels.tree_attention import tree_attention
from sharding.ranks import ONE, Ranks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NodeKeys(Keys):
    """The keys that each node attends in one kind of layer: this rank's cache slots ``cached``, and those of the tree that it sees.

    In ``sees_BNS`` the keys of nodes from earlier passes come first, then those of this pass's nodes. A node's key is not cached until
    the node is accepted. ``apart``: as in :class:`l4jax.cache.PageTables`.
    """

    cached: Interval
    sees_BNS: Bool[Array, "B N S"]
    pages_BW: Int32[Array, "B W"]
    apart: bool = dataclasses.field(metadata={"static": True})

    def attend(
        self,
        heads: Heads,
        cache: TreeCache,
        ranks: Ranks,
        *,
        scale: float,
    ) -> tuple[Float[Array, "B N K G h"], TreeCache]:
        """Every rank has all nodes' keys, and its own part of the cached keys."""
        q_BNKGh, k_BNKh, v_BNKh = split_heads(heads)
        cache = cache.extended(k_BNKh, v_BNKh)
        prefix = PagedKeys(cache.layer.k_PKph, cache.layer.v_PKph, self.pages_BW, self.cached)
        tree = TreeKeys(cache.k_BSKh, cache.v_BSKh, self.sees_BNS)
        partial = tree_attention(q_BNKGh, tree, prefix, scale=scale, apart=self.apart, dtype=attention_dtype(ranks, q_BNKGh))
        return merge_over(ranks, partial).astype(q_BNKGh.dtype), cache


def tree_step(
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

    def keys(chunk: int | None, pages_BW: Array) -> NodeKeys:
        one_B = jnp.ones_like(start_B)
        of_root = full_intervals(start_B, one_B, 1, ranks) if chunk is None else local_intervals(start_B, one_B, 1, chunk, ranks)
        first_BN = jnp.zeros_like(position_BN)
        if window is not None:
            chunk_start_B = jnp.zeros_like(start_B) if chunk is None else start_B // chunk * chunk
            first_BN = jnp.maximum(position_BN + 1 - window - chunk_start_B[:, None], 0)
            first_BN = slots_before(first_BN, ranks.index(), ranks.count) if chunk is None else first_BN
        cached = Interval(first_BN, jnp.broadcast_to(of_root.cached.end_BT, position_BN.shape))
        return NodeKeys(cached, sees_BNS, pages_BW, tables.rows_apart)

    full, chunk = keys(None, tables.full_BW), config.attention_chunk_size
    return StepInputs.at(config, position_BN, valid_BN, full, full if chunk is None else keys(chunk, tables.local_Bw))

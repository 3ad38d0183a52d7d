"""What attention reads: keys and values in pages of a cache, or of a draft tree's nodes, and which of them each query sees."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Interval:
    """Each query sees the keys with index in [start, end), in tokens: causal, chunk-local, prefix and padding masks are all intervals."""

    start_BT: Int32[Array, "B T"]
    end_BT: Int32[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewKeys:
    """Keys and values of a step's own tokens, or of those that a ring has passed."""

    k_BSKh: Float[Array, "B S K h"]
    v_BSKh: Float[Array, "B S K h"]
    interval: Interval


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKeys:
    """A cache's pools of pages, of which a row's table names some: key ``s`` of row ``b`` is token ``s % p`` of page
    ``pages_BW[b, s // p]``. Table entries outside a row's interval may name any page, but must be valid indices.
    """

    k_PKph: Float[Array, "P K p h"]
    v_PKph: Float[Array, "P K p h"]
    pages_BW: Int32[Array, "B W"]
    interval: Interval


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TreeKeys:
    """Keys and values of a draft tree's nodes. ``sees_BNS[b, n, s]``: query node n sees key s.

    S may exceed N: the keys of earlier passes' nodes are the first.
    """

    k_BSKh: Float[Array, "B S K h"]
    v_BSKh: Float[Array, "B S K h"]
    sees_BNS: Bool[Array, "B N S"]

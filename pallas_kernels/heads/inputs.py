"""What the projections of attention give, and where keys and values go."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float, Float32, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heads:
    """Queries, keys and values as the projection gives them: of each KV head the G query heads, the key, the value (s = G + 2).

    Each of the others may be None, for what is not done. ``angles``: cosine and sine of every pair's rotation, for queries and keys.
    ``norm_eps``: the epsilon with which rotated queries and keys are RMS-normalised. ``scale_BT``: queries are multiplied by it.
    """

    qkv_BTKsh: Float[Array, "B T K s h"]
    angles: tuple[Float32[Array, "B T r"], Float32[Array, "B T r"]] | None = None
    scale_BT: Float32[Array, "B T"] | None = None
    norm_eps: float | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pools:
    """A layer's pages of keys and of values."""

    k_PKph: Float[Array, "P K p h"]
    v_PKph: Float[Array, "P K p h"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """Where each token's key and value go: a page, and a place in it. A page past the last one: nowhere."""

    page_BT: Int32[Array, "B T"]
    offset_BT: Int32[Array, "B T"]

"""What the projections of attention give, and where keys and values go."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float, Float32, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heads:
    """Queries, keys and values as the projection gives them: for each KV head its G query heads, then its key, then its value (g = G + 2).

    A field that is None leaves its operation out. ``angles``: cosine and sine of every pair's rotation, for queries and keys. ``scale_BT``:
    queries are multiplied by it. ``norm_eps``: rotated queries and keys are RMS-normalised with this epsilon; without ``angles`` there is
    no norm.
    """

    qkv_BTKgh: Float[Array, "B T K g h"]
    angles: tuple[Float32[Array, "B T r"], Float32[Array, "B T r"]] | None = None
    scale_BT: Float32[Array, "B T"] | None = None
    norm_eps: float | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pools:
    """One layer's pages of keys and of values."""

    k_PKph: Float[Array, "P K p h"]
    v_PKph: Float[Array, "P K p h"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """The page, and the place in it, that each token's key and value are written to. Those with a page past the last one are dropped."""

    page_BT: Int32[Array, "B T"]
    offset_BT: Int32[Array, "B T"]

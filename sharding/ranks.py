"""Collectives over the devices along some mesh axes; with a single device they do nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Shaped


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The devices along some mesh axes, numbered with the first axis outermost; for use inside ``jax.shard_map``.

    With one device every method is the identity, so code that uses ``Ranks`` runs outside ``shard_map`` too.
    """

    axes: tuple[str, ...] = ()
    count: int = 1

    def index(self) -> Int32[Array, ""]:
        """This device's number among them."""
        return jax.lax.axis_index(self.axes).astype(jnp.int32) if self.axes else jnp.int32(0)

    def sum(self, x: Shaped[Array, "*B"]) -> Shaped[Array, "*B"]:
        """The sum of every rank's array, on all of them."""
        return jax.lax.psum(x, self.axes) if self.axes else x

    def max(self, x: Shaped[Array, "*B"]) -> Shaped[Array, "*B"]:
        """The elementwise maximum of every rank's array, on all of them."""
        return jax.lax.pmax(x, self.axes) if self.axes else x

    def from_first(self, x: Shaped[Array, "*B"]) -> Shaped[Array, "*B"]:
        """Rank 0's array, on all of them."""
        return self.sum(jnp.where(self.index() == 0, x, jnp.zeros_like(x)))

    def any(self, x: Bool[Array, "*B"]) -> Bool[Array, "*B"]:
        """True, on all of them, where at least one rank has True."""
        return self.max(x.astype(jnp.int32)) > 0

    def gather(self, x: Shaped[Array, "*B"]) -> Shaped[Array, "R *B"]:
        """Every rank's array along a new leading axis, on all of them."""
        return jax.lax.all_gather(x, self.axes) if self.axes else x[None]

    def concatenate(self, x: Shaped[Array, "*B"], axis: int) -> Shaped[Array, "..."]:
        """Every rank's array, one after the other along an existing axis, on all of them."""
        return jax.lax.all_gather(x, self.axes, axis=axis, tiled=True) if self.axes else x


ONE = Ranks()
"""A single device."""


def local_index(token: Int32[Array, "*B"], size: int, vocab_ranks: Ranks) -> Int32[Array, "*B"]:
    """Index of each token among this rank's ``size`` tokens of a vocabulary that is sharded; ``size`` for other ranks' tokens."""
    index = token - vocab_ranks.index() * size
    return jnp.where((index >= 0) & (index < size), index, size)

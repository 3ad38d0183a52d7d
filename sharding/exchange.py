"""Sends rows of an array to the ranks that work on them, and the results back. No row is dropped, whatever the imbalance."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from sharding.ranks import Ranks


@dataclasses.dataclass(frozen=True)
class RowExchange:
    """Exchange of rows that are sorted by destination; ``size_RR[i, j]``: how many rows rank i sends to rank j.

    On NVIDIA GPUs only the rows are sent (``ragged_all_to_all``); elsewhere the message to each rank is padded to hold all rows.
    """

    ranks: Ranks
    size_RR: Int32[Array, "R R"]

    def send(self, rows_MD: Shaped[Array, "M D"]) -> Shaped[Array, "A D"]:
        """Send every row to its rank; returns the rows that arrive here, by sender and in order, then meaningless rows up to A = R M."""
        room = self.ranks.count * rows_MD.shape[0]
        return _all_to_all(rows_MD, self.size_RR, self.ranks, room)

    def send_back(self, rows_AD: Shaped[Array, "A D"]) -> Shaped[Array, "M D"]:
        """The inverse of :meth:`send`: send each row back to where it came from."""
        return _all_to_all(rows_AD, self.size_RR.T, self.ranks, rows_AD.shape[0] // self.ranks.count)


def _all_to_all(rows_MD: Array, size_RR: Array, ranks: Ranks, room: int) -> Array:
    """Send a run of rows to every rank; the runs that arrive are put one after the other in an array of ``room`` rows."""
    me = ranks.index()
    sent_R, received_R = size_RR[me], size_RR[:, me]
    begin_R = jnp.cumsum(sent_R) - sent_R
    # On the receiving rank, this rank's run begins after the runs of the ranks before it.
    target_R = (jnp.cumsum(size_RR, axis=0) - size_RR)[me]

    def ragged(rows_MD: Array) -> Array:
        into = jnp.zeros((room, rows_MD.shape[1]), rows_MD.dtype)
        return jax.lax.ragged_all_to_all(rows_MD, into, begin_R, sent_R, target_R, received_R, axis_name=ranks.axes)

    def dense(rows_MD: Array) -> Array:
        # No rank sends another more rows than either has room for.
        longest = min(rows_MD.shape[0], room)
        index_RC = begin_R[:, None] + jnp.arange(longest, dtype=jnp.int32)[None, :]
        leaving_RCD = rows_MD.at[index_RC].get(mode="clip")
        arriving_RCD = jax.lax.all_to_all(leaving_RCD, ranks.axes, split_axis=0, concat_axis=0)
        end_R = jnp.cumsum(received_R)
        row = jnp.arange(room, dtype=jnp.int32)
        sender = jnp.minimum(jnp.searchsorted(end_R, row, side="right"), ranks.count - 1)
        return arriving_RCD.at[sender, row - (end_R - received_R)[sender]].get(mode="clip")

    return jax.lax.platform_dependent(rows_MD, cuda=ragged, default=dense)

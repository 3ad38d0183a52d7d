"""Exact attention over a sequence that is spread over the ranks of a mesh axis: pass-KV and pass-Q.

Both are from "Context Parallelism for Scalable Million-Token Inference" (arXiv 2411.01783, algorithms 2 and 3) and run inside
``jax.shard_map``. Cached keys and the keys of new tokens are in one array. A layout (``sharding.layout``), which every rank knows, gives
the position in each slot of each rank, so positions are never sent. Partial results are merged by their log-sum-exp in float32 (float64
for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.keys import Interval, NewKeys
from pallas_kernels.merge import Partial, merge_attention
from sharding.layout import EMPTY

PARTIAL_BYTES = 4
"""Bytes per number of the partial results that :func:`pass_q` sends back."""


def pass_kv(
    q_BTKGh: Float[Array, "B T K G h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    query_position_RBT: Int32[Array, "R B T"],
    key_position_RBS: Int32[Array, "R B S"],
    *,
    axis_name: str | tuple[str, ...],
    scale: float,
    chunk: int | Int32[Array, ""] | None = None,
    window: int | None = None,
    segments: Sequence[int] | None = None,
) -> Partial:
    """Attention of this rank's queries over all ranks' keys. The ring passes keys and values, in R - 1 transfers of one message each.

    Every rank has the same position arrays, indexed [rank, row, slot]. ``segments``: the sizes of the runs of slots that make up S,
    say cached keys and new keys; one run by default. In each run the positions of keys ascend, and empty slots come last. A query at
    position p sees keys at positions up to p; with ``chunk``, only those of its own attention chunk; with ``window``, only the last
    ``window`` of them. Scores are multiplied by ``scale``. Returns this rank's output and log-sum-exp.
    """
    ranks, rank = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    query_position_BT = query_position_RBT[rank]
    # The barriers force XLA to run each hop's transfer during that hop's attention; without them it would start transfers late.
    q_BTKGh, kv_2BSKh = jax.lax.optimization_barrier((q_BTKGh, jnp.stack([k_BSKh, v_BSKh])))
    merged: Partial | None = None
    for hop in range(ranks):
        # Issued before the attention that overlaps with it. After the last hop no rank needs the keys again.
        arriving = _to_next(kv_2BSKh, axis_name) if hop < ranks - 1 else kv_2BSKh
        with jax.named_scope(f"ring_hop_{hop}"):
            key_position_BS = key_position_RBS[(rank - hop) % ranks]
            partial = attend_positions(q_BTKGh, kv_2BSKh, query_position_BT, key_position_BS, chunk, window, segments, scale=scale)
            merged = partial if merged is None else merge_attention([merged, partial])
        kv_2BSKh, merged = jax.lax.optimization_barrier((arriving, merged))
    assert merged is not None
    return merged


def pass_q(
    q_BTKGh: Float[Array, "B T K G h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    query_position_RBT: Int32[Array, "R B T"],
    key_position_RBS: Int32[Array, "R B S"],
    *,
    axis_name: str | tuple[str, ...],
    scale: float,
    chunk: int | Int32[Array, ""] | None = None,
    window: int | None = None,
    segments: Sequence[int] | None = None,
) -> Partial:
    """As :func:`pass_kv`, but the ring passes queries, in R - 1 transfers; then one all-to-all sends each rank's results back."""
    ranks, rank = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    q_BTKGh, kv_2BSKh = jax.lax.optimization_barrier((q_BTKGh, jnp.stack([k_BSKh, v_BSKh])))
    key_position_BS = key_position_RBS[rank]
    results = []
    for hop in range(ranks):
        arriving = _to_next(q_BTKGh, axis_name) if hop < ranks - 1 else q_BTKGh
        with jax.named_scope(f"ring_hop_{hop}"):
            query_position_BT = query_position_RBT[(rank - hop) % ranks]
            out_BTKGh, lse_BTKG = attend_positions(
                q_BTKGh, kv_2BSKh, query_position_BT, key_position_BS, chunk, window, segments, scale=scale
            )
            result = jnp.concatenate([out_BTKGh, lse_BTKG[..., None]], axis=-1)
        q_BTKGh, result = jax.lax.optimization_barrier((arriving, result))
        results.append(result)
    # The result of hop j belongs to the rank j places back. The all-to-all needs the results in the order of their owners.
    by_owner = jnp.stack(results)[(rank - jnp.arange(ranks, dtype=jnp.int32)) % ranks]
    mine = jax.lax.all_to_all(by_owner, axis_name, split_axis=0, concat_axis=0)
    return merge_attention([(part[..., :-1], part[..., -1]) for part in mine])


def _to_next(array: Array, axis_name: str | tuple[str, ...]) -> Array:
    ranks = jax.lax.axis_size(axis_name)
    return jax.lax.ppermute(array, axis_name, [(i, (i + 1) % ranks) for i in range(ranks)])


def attend_positions(
    q_BTKGh: Float[Array, "B T K G h"],
    kv_2BSKh: Float[Array, "2 B S K h"],
    query_position_BT: Int32[Array, "B T"],
    key_position_BS: Int32[Array, "B S"],
    chunk: int | Int32[Array, ""] | None = None,
    window: int | None = None,
    segments: Sequence[int] | None = None,
    *,
    scale: float,
) -> Partial:
    """Attention of queries on this rank over keys on this rank, as in :func:`pass_kv`. Raises ValueError unless ``segments`` make up S."""
    slots = kv_2BSKh.shape[2]
    if segments is not None and sum(segments) != slots:
        raise ValueError(f"segments {tuple(segments)} are {sum(segments)} slots; expected runs that make up all {slots}")
    partials, first = [], 0
    for size in segments or (slots,):
        run = slice(first, first + size)
        partials.append(_attend_run(q_BTKGh, kv_2BSKh[:, :, run], query_position_BT, key_position_BS[:, run], chunk, window, scale))
        first += size
    return partials[0] if len(partials) == 1 else merge_attention(partials)


def _attend_run(
    q_BTKGh: Array,
    kv_2BSKh: Array,
    query_position_BT: Array,
    key_position_BS: Array,
    chunk: int | Array | None,
    window: int | None,
    scale: float,
) -> Partial:
    """Attention over one run of keys in ascending order: the keys that a query sees are an interval of slots."""
    sorted_BS = jnp.where(key_position_BS == EMPTY, jnp.int32(2**31 - 1), key_position_BS)

    def slots_below(position_BT: Array) -> Array:
        return jax.vmap(lambda keys_S, bounds_T: jnp.searchsorted(keys_S, bounds_T).astype(jnp.int32))(sorted_BS, position_BT)

    # An empty query slot is at position -1 and sees nothing.
    end_BT = slots_below(query_position_BT + 1)
    start_BT = jnp.zeros_like(end_BT)
    if chunk is not None:
        start_BT = slots_below(query_position_BT // chunk * chunk)
    if window is not None:
        start_BT = jnp.maximum(start_BT, slots_below(query_position_BT + 1 - window))
    return flash_attention(q_BTKGh, NewKeys(kv_2BSKh[0], kv_2BSKh[1], Interval(start_BT, end_BT)), scale=scale)

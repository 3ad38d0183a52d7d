"""Tree attention as a Mosaic GPU kernel for Hopper GPUs: the cached prefix in blocks of 64 keys, then the tree's own keys."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.implementations import require_hopper
from pallas_kernels.keys import PagedKeys, TreeKeys
from pallas_kernels.merge import Partial, merge_splits
from pallas_kernels.mosaic import (
    LOG2_E,
    MASKED,
    NOWHERE,
    ROWS,
    SHARED_BYTES,
    SMS,
    Softmax,
    add_product,
    copy_in_turn,
    finish,
    kernel,
    no_keys,
    online_softmax,
    over,
    plgpu,
    product,
    require_supported,
    tiles,
)

MOST_NODES = 64
KEYS = 64
"""Cached keys that are copied and attended together."""
_MOST_STAGES = 4
_MOST_WAVES = 4
_REGISTERS = {1: 232, 2: 216}
"""Of a thread that computes, by the number of warpgroups that do; one that copies keeps 40. All must fit in a multiprocessor's 65,536."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut. The grid is (batch, KV heads, ``groups``, ``splits``): a thread block computes ``warpgroups`` x 64 query rows
    (a node's query head each) over one split of the sequence's cached keys, as in flash-decoding.

    ``rows``: query rows of a KV head, rounded up to 8: as many are stored. ``h``: head dimension. ``tree_keys``: the tree's keys, padded.
    ``stages``: blocks of cached keys that are being copied, or attended, at a time: as many as shared memory holds, up to 4.
    """

    rows: int
    h: int
    warpgroups: int
    groups: int
    splits: int
    tree_keys: int
    stages: int

    @classmethod
    def of(cls, batch: int, heads: int, rows: int, tree_keys: int, slots: int, h: int) -> Tiling:
        """For ``rows`` query rows a KV head, and page tables of ``slots`` tokens. At most ``MOST_NODES`` keys of a tree.

        Only sizes of arrays decide, so in programs of the same sizes a sequence's result does not depend on the others.
        """
        warpgroups = 1 if rows <= ROWS else 2
        groups = -(-rows // (warpgroups * ROWS))
        splits = _splits(batch * heads * groups, max(1, slots // KEYS))
        padded = next(keys for keys in (0, 16, 32, MOST_NODES) if tree_keys <= keys)
        without = cls(-(-rows // 8) * 8, h, warpgroups, groups, splits, padded, 0)
        return dataclasses.replace(without, stages=min(_MOST_STAGES, (SHARED_BYTES - without.shared_bytes) // (2 * KEYS * 2 * h)))

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block's arrays: queries, output, rows' bounds and masks, the tree, and blocks of cached keys."""
        return self.warpgroups * ROWS * (2 * self.h + 4 * self.h + 20) + 2 * (self.tree_keys + self.stages * KEYS) * 2 * self.h


def _splits(blocks: int, most: int) -> int:
    """In how many splits of the cached keys thread blocks of equal work take the least time: those of the last wave may leave
    multiprocessors idle. More splits have more results to merge, so they must save a tenth of the time.
    """

    def time(splits: int) -> float:
        return -(-blocks * splits // SMS) / splits

    best = max(1, min(SMS // blocks, most))
    for splits in range(best + 1, min(most, _MOST_WAVES * SMS // blocks) + 1):
        if time(splits) < 0.9 * time(best):
            best = splits
    return best


def tree_attention(
    q_BNKGh: Float[Array, "B N K G h"],
    tree: TreeKeys | None,
    prefix: PagedKeys,
    *,
    scale: float,
    apart: bool = False,
    dtype: Any = None,
) -> Partial:
    """Each split attends some of the cached keys, and the first one the tree as well; another kernel merges their results.

    In a thread block one warpgroup copies keys and values to shared memory, and one or two others compute. The query heads of all nodes
    that share a KV head are the rows of one matrix product. Weights are rounded to the dtype of the values. Sequences are always computed
    apart. Raises NotImplementedError for what the kernel does not take.
    """
    del apart
    require_hopper()
    require_supported(q_BNKGh, () if tree is None else (tree.k_BSKh, tree.v_BSKh), KEYS, prefix)
    B, N, K, G, h = q_BNKGh.shape
    S, page_size = 0 if tree is None else tree.k_BSKh.shape[1], prefix.k_PKph.shape[2]
    if S > MOST_NODES:
        raise NotImplementedError(f"takes up to {MOST_NODES} keys of a tree; this one has {S}")
    tiling = Tiling.of(B, K, N * G, S, prefix.pages_BW.shape[1] * page_size, h)
    all_rows = tiling.groups * tiling.warpgroups * ROWS

    def of_heads(values_BN: Array) -> Array:
        return jnp.pad(jnp.repeat(values_BN, G, axis=1), ((0, 0), (0, all_rows - N * G)))

    def nodes(tree_BSKh: Array) -> Array:
        return jnp.pad(jnp.swapaxes(tree_BSKh, 1, 2), ((0, 0), (0, 0), (0, tiling.tree_keys - S), (0, 0)))

    q_BKMh = jnp.swapaxes(q_BNKGh, 1, 2).reshape(B, K, N * G, h)
    start_BN, end_BN = prefix.interval.start_BT, prefix.interval.end_BT
    none_BN = start_BN >= end_BN
    start_BN, end_BN = jnp.where(none_BN, NOWHERE, start_BN), jnp.where(none_BN, 0, end_BN)
    # The earliest start, the latest end, the latest start and the earliest end: no node sees keys outside the first two, and every node
    # sees those between the last two, which need no mask.
    bounds_B4 = jnp.stack([jnp.min(start_BN, axis=1), jnp.max(end_BN, axis=1), jnp.max(start_BN, axis=1), jnp.min(end_BN, axis=1)], axis=1)
    of_nodes = [start_BN, end_BN] if tree is None else [start_BN, end_BN, *_words(tree.sees_BNS)]
    out_BKzMh, lse_BKzM = _kernel(tiling, B, K, N * G, page_size, q_BNKGh.dtype, scale)(
        q_BKMh,
        prefix.k_PKph,
        prefix.v_PKph,
        jnp.stack([of_heads(values_BN) for values_BN in of_nodes], axis=1),
        bounds_B4,
        prefix.pages_BW,
        *([] if tree is None else [nodes(tree.k_BSKh), nodes(tree.v_BSKh)]),
    )
    return merge_splits(out_BKzMh, lse_BKzM, N, G, dtype or jnp.float32)


def _words(sees_BNS: Array) -> tuple[Array, Array]:
    """Which of the tree's first 32 keys each node sees, and which of its next 32: a bit for each key."""
    B, N, S = sees_BNS.shape
    sees_BN2j = jnp.pad(sees_BNS, ((0, 0), (0, 0), (0, MOST_NODES - S))).reshape(B, N, 2, 32)
    bit_j = jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)
    words_BN2 = jnp.sum(jnp.where(sees_BN2j, bit_j, jnp.uint32(0)), axis=-1, dtype=jnp.uint32)
    words_BN2 = jax.lax.bitcast_convert_type(words_BN2, jnp.int32)
    return words_BN2[..., 0], words_BN2[..., 1]


def _kernel(tiling: Tiling, B: int, K: int, M: int, page_size: int, dtype: Any, scale: float) -> Callable[..., tuple[Array, Array]]:
    """The kernel for M query rows a KV head: (queries, pools, each row's start, end and mask, bounds, page tables, the tree's keys and
    values) to (output, log-sum-exp) of each split. Without a tree there are no masks either.
    """
    h, warpgroups, splits, tree_keys, stages = tiling.h, tiling.warpgroups, tiling.splits, tiling.tree_keys, tiling.stages
    whole_warpgroups, last_rows = divmod(M, ROWS)
    key_blocks_a_page = page_size // KEYS

    def body(q_ref: Any, k_ref: Any, v_ref: Any, rows_ref: Any, bounds_ref: Any, pages_ref: Any, *given: Any) -> None:
        refs = iter(given)
        if tree_keys:
            k_tree_ref, v_tree_ref = next(refs), next(refs)
        out_ref, lse_ref, q_s, rows_s, k_s, v_s, out_s, lse_s = (next(refs) for _ in range(8))
        q_loaded, rows_loaded, k_loaded, v_loaded, k_consumed, v_consumed = (next(refs) for _ in range(6))
        if tree_keys:
            k_tree_s, v_tree_s, tree_loaded = refs
        b, head, group, split = (jax.lax.axis_index(name) for name in ("row", "head", "group", "split"))
        warpgroup = jax.lax.axis_index("warpgroup")
        first_start, last_end, last_start, first_end = (bounds_ref[b, i] for i in range(4))
        first = first_start // KEYS
        last = jnp.maximum((last_end + KEYS - 1) // KEYS, first)
        share = (last - first + splits - 1) // splits
        begin = first + split * share
        steps = jnp.maximum(jnp.minimum(begin + share, last) - begin, 0)

        @pl.when(warpgroup == warpgroups)
        def _copy() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @pl.when(split == 0)
            def _tree() -> None:
                if tree_keys:
                    plgpu.copy_gmem_to_smem(k_tree_ref.at[b, head], k_tree_s, tree_loaded)
                    plgpu.copy_gmem_to_smem(v_tree_ref.at[b, head], v_tree_s, tree_loaded)

            def fetch(step: Array, stage: Array) -> None:
                block = begin + step
                page, keys = pages_ref[b, block // key_blocks_a_page], pl.ds(jax.lax.rem(block, key_blocks_a_page) * KEYS, KEYS)
                plgpu.copy_gmem_to_smem(k_ref.at[page, head, keys], k_s.at[stage], k_loaded.at[stage])
                plgpu.copy_gmem_to_smem(v_ref.at[page, head, keys], v_s.at[stage], v_loaded.at[stage])

            copy_in_turn(steps, stages, (k_consumed, v_consumed), fetch)

        @pl.when(warpgroup < warpgroups)
        def _compute() -> None:
            plgpu.set_max_registers(_REGISTERS[warpgroups], action="increase")
            number = group * warpgroups + warpgroup

            def for_valid_rows(copy: Callable[[Any, Any], None], last_rows: int = last_rows) -> None:
                """Call ``copy(rows in memory, rows in shared memory)`` for this warpgroup's rows, if there are any. Other rows are computed
                too, from whatever is in shared memory, but nobody reads what is stored of them.
                """
                for any_such, rows, condition in (
                    (whole_warpgroups, ROWS, number < whole_warpgroups),
                    (last_rows, last_rows, number == whole_warpgroups),
                ):
                    if any_such:
                        pl.when(condition)(functools.partial(copy, pl.ds(number * ROWS, rows), pl.ds(0, rows)))

            def load_queries(of_head: Any, own: Any) -> None:
                plgpu.copy_gmem_to_smem(q_ref.at[b, head, of_head], q_s.at[warpgroup, own], q_loaded.at[warpgroup])
                plgpu.barrier_wait(q_loaded.at[warpgroup])

            plgpu.copy_gmem_to_smem(rows_ref.at[b, :, pl.ds(number * ROWS, ROWS)], rows_s.at[warpgroup], rows_loaded.at[warpgroup])
            for_valid_rows(load_queries)
            plgpu.barrier_wait(rows_loaded.at[warpgroup])
            q = plgpu.load(q_s.at[warpgroup], layout=plgpu.Layout.WGMMA)

            def of_rows(index: int, columns: int) -> Array:
                return over(plgpu.load(rows_s.at[warpgroup, index], layout=plgpu.Layout.WGMMA.reduce(1)), columns)

            def step(index: Array, before: Softmax) -> Softmax:
                stage, first_key = jax.lax.rem(index, stages), (begin + index) * KEYS
                plgpu.barrier_wait(k_loaded.at[stage])
                score = product(q, k_s.at[stage].T, KEYS) * (scale * LOG2_E)
                plgpu.barrier_arrive(k_consumed.at[stage])

                def masked(score: Array) -> Array:
                    key = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=plgpu.Layout.WGMMA) + first_key
                    return jnp.where((key >= of_rows(0, KEYS)) & (key < of_rows(1, KEYS)), score, MASKED)

                seen_by_all = (first_key >= last_start) & (first_key + KEYS <= first_end)
                weight, (out, highest, total) = online_softmax(jax.lax.cond(seen_by_all, lambda score: score, masked, score), before, dtype)
                plgpu.barrier_wait(v_loaded.at[stage])
                out = add_product(out, weight, v_s.at[stage])
                plgpu.barrier_arrive(v_consumed.at[stage])
                return out, highest, total

            def tree(before: Softmax) -> Softmax:
                plgpu.barrier_wait(tree_loaded)
                score = product(q, k_tree_s.T, tree_keys) * (scale * LOG2_E)
                key = plgpu.broadcasted_iota(jnp.int32, (ROWS, tree_keys), 1, layout=plgpu.Layout.WGMMA)
                word = of_rows(2, tree_keys)
                if tree_keys > 32:
                    word = jnp.where(key < 32, word, of_rows(3, tree_keys))
                score = jnp.where(((word >> (key & 31)) & 1) != 0, score, MASKED)
                weight, (out, highest, total) = online_softmax(score, before, dtype)
                return add_product(out, weight, v_tree_s), highest, total

            attended = jax.lax.fori_loop(0, steps, step, no_keys(h))
            if tree_keys:
                attended = jax.lax.cond(split == 0, tree, lambda attended: attended, attended)
            out_s[warpgroup], lse_s[warpgroup] = finish(attended)
            plgpu.commit_smem()

            def store(of_head: Any, own: Any) -> None:
                plgpu.copy_smem_to_gmem(out_s.at[warpgroup, own], out_ref.at[b, head, split, of_head])
                plgpu.copy_smem_to_gmem(lse_s.at[warpgroup, own], lse_ref.at[b, head, split, of_head])
                plgpu.wait_smem_to_gmem(0)

            for_valid_rows(store, -(-last_rows // 8) * 8)  # a copy of the output takes whole tiles

    results = B, K, splits, tiling.rows
    tree_types = (
        [
            plgpu.SMEM((tree_keys, h), dtype, transforms=tiles(64)),
            plgpu.SMEM((tree_keys, h), dtype, transforms=tiles(tree_keys)),  # a product sums over a multiple of a tile's columns
            plgpu.Barrier(num_arrivals=2),
        ]
        if tree_keys
        else []
    )
    return kernel(
        "tree_attention",
        body,
        out_type=(jax.ShapeDtypeStruct((*results, h), jnp.float32), jax.ShapeDtypeStruct(results, jnp.float32)),
        grid=(B, K, tiling.groups, splits),
        grid_names=("row", "head", "group", "split"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((warpgroups, ROWS, h), dtype),  # in no tiles, so that any number of rows can be copied
            plgpu.SMEM((warpgroups, 4 if tree_keys else 2, ROWS), jnp.int32),
            plgpu.SMEM((stages, KEYS, h), dtype, transforms=tiles(64)),
            plgpu.SMEM((stages, KEYS, h), dtype, transforms=tiles(64)),
            plgpu.SMEM((warpgroups, ROWS, h), jnp.float32, transforms=tiles(32, 4)),
            plgpu.SMEM((warpgroups, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=warpgroups),
            plgpu.Barrier(num_barriers=warpgroups),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups),
            plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups),
            *tree_types,
        ],
    )

"""Attention of many queries as a Mosaic GPU kernel for Hopper GPUs: over a paged cache and over new keys (arXiv 2407.08608)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.implementations import require_hopper
from pallas_kernels.keys import Interval, NewKeys, PagedKeys
from pallas_kernels.merge import Partial
from pallas_kernels.mosaic import (
    LOG2_E,
    MASKED,
    NOWHERE,
    ROWS,
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

KEYS = 64
"""Keys that are copied and attended together."""
_STAGES = 3
"""Copies of keys that are under way, or attended, at a time."""


def flash_attention(
    q_BTKGh: Float[Array, "B T K G h"], new: NewKeys, cached: PagedKeys | None, *, scale: float, apart: bool = False
) -> Partial:
    """A thread block computes 128 queries of one head (64 if there are no more) over all keys that any of them sees, 64 at a time.

    One of its warpgroups copies keys and values to shared memory, and one or two others compute. Blocks of keys that all queries see are
    not masked, and blocks that none sees are not read. Weights are rounded to the dtype of the values. Sequences are always computed apart.
    Raises NotImplementedError for what the kernel does not take.
    """
    del apart
    require_hopper()
    require_supported(q_BTKGh, (new.k_BSKh, new.v_BSKh), KEYS, cached)
    B, T, K, G, h = q_BTKGh.shape
    warpgroups = 1 if T <= ROWS else 2
    more_queries, more_keys = -T % (warpgroups * ROWS), -new.k_BSKh.shape[1] % KEYS

    def padded(array: Array, more: int) -> Array:
        return jnp.pad(array, [(0, 0), (0, more), *[(0, 0)] * (array.ndim - 2)]) if more else array

    page_size = None if cached is None else cached.k_PKph.shape[2]
    intervals = [new.interval] if cached is None else [new.interval, cached.interval]
    numbers, bounds = zip(*(_rows_and_bounds(interval, more_queries, warpgroups) for interval in intervals), strict=True)
    out_BTKGh, lse_BKGT = _kernel((B, T + more_queries, K, G, h), warpgroups, page_size, q_BTKGh.dtype, scale)(
        padded(q_BTKGh, more_queries),
        padded(new.k_BSKh, more_keys),
        padded(new.v_BSKh, more_keys),
        jnp.concatenate(numbers, axis=1),
        jnp.concatenate(bounds, axis=2),
        *(() if cached is None else (cached.k_PKph, cached.v_PKph, cached.pages_BW)),
    )
    return out_BTKGh[:, :T], jnp.moveaxis(lse_BKGT[..., :T], 3, 1)


def shared_bytes(warpgroups: int, h: int) -> int:
    """Shared memory of a thread block's arrays: queries, output, their bounds and log-sum-exp, and blocks of keys."""
    return warpgroups * ROWS * (2 * h + 4 * h + 20) + 2 * _STAGES * KEYS * 2 * h


def _rows_and_bounds(interval: Interval, more: int, warpgroups: int) -> tuple[Array, Array]:
    """Each query's start and end, [B, 2, T]; and four bounds for each block of queries, [B, blocks, 4].

    Keys before the first bound, or from the second on, are seen by no query of the block; those between the others by all.
    """
    none_BT = interval.start_BT >= interval.end_BT
    start_BT, end_BT = jnp.where(none_BT, NOWHERE, interval.start_BT), jnp.where(none_BT, 0, interval.end_BT)
    start_BT, end_BT = jnp.pad(start_BT, ((0, 0), (0, more)), constant_values=NOWHERE), jnp.pad(end_BT, ((0, 0), (0, more)))
    start_Bbt, end_Bbt = (a.reshape(len(a), -1, warpgroups * ROWS) for a in (start_BT, end_BT))
    bounds = [jnp.min(start_Bbt, axis=2), jnp.max(end_Bbt, axis=2), jnp.max(start_Bbt, axis=2), jnp.min(end_Bbt, axis=2)]
    return jnp.stack([start_BT, end_BT], axis=1), jnp.stack(bounds, axis=2)


def _kernel(
    shape: tuple[int, int, int, int, int], warpgroups: int, page_size: int | None, dtype: Any, scale: float
) -> Callable[..., tuple[Array, Array]]:
    """The kernel for queries of this shape: (queries, new keys and values, each query's starts and ends, bounds; with a cache also its
    pools and page tables) to (output, log-sum-exp).
    """
    B, T, K, G, h = shape
    blocks, key_blocks_a_page = T // (warpgroups * ROWS), (page_size or 0) // KEYS

    def body(q_ref: Any, k_new_ref: Any, v_new_ref: Any, rows_ref: Any, bounds_ref: Any, *refs: Any) -> None:
        if page_size is not None:
            (k_ref, v_ref, pages_ref), refs = refs[:3], refs[3:]
        out_ref, lse_ref, q_s, rows_s, k_s, v_s, out_s, lse_s, q_loaded, k_loaded, v_loaded, k_consumed, v_consumed = refs
        b, head, query_head = (jax.lax.axis_index(name) for name in ("row", "head", "query_head"))
        # Later queries see more keys: they begin first, so that no long block is left at the end.
        block = blocks - 1 - jax.lax.axis_index("block")
        warpgroup = jax.lax.axis_index("warpgroup")

        def bounds(of: int) -> tuple[Array, Array, Array, Array]:
            """The first block of keys, the number of blocks, and between which keys all queries see all, of cached or of new keys."""
            start, end, last_start, first_end = (bounds_ref[b, block, of + i] for i in range(4))
            first = start // KEYS
            return first, jnp.maximum((end + KEYS - 1) // KEYS - first, 0), last_start, first_end

        first_new, of_new, *new_whole = bounds(0)
        first_cached, of_cache, *cached_whole = (jnp.int32(0),) * 4 if page_size is None else bounds(4)
        steps = of_cache + of_new

        @pl.when(warpgroup == warpgroups)
        def _copy() -> None:
            plgpu.set_max_registers(24, action="decrease")

            def fetch(step: Array, stage: Array) -> None:
                @pl.when(step < of_cache)
                def _of_pages() -> None:
                    if page_size is None:
                        return
                    block = first_cached + step
                    page, keys = pages_ref[b, block // key_blocks_a_page], pl.ds(jax.lax.rem(block, key_blocks_a_page) * KEYS, KEYS)
                    plgpu.copy_gmem_to_smem(k_ref.at[page, head, keys], k_s.at[stage], k_loaded.at[stage])
                    plgpu.copy_gmem_to_smem(v_ref.at[page, head, keys], v_s.at[stage], v_loaded.at[stage])

                @pl.when(step >= of_cache)
                def _of_new() -> None:
                    keys = pl.ds((first_new + step - of_cache) * KEYS, KEYS)
                    plgpu.copy_gmem_to_smem(k_new_ref.at[b, keys, head], k_s.at[stage], k_loaded.at[stage])
                    plgpu.copy_gmem_to_smem(v_new_ref.at[b, keys, head], v_s.at[stage], v_loaded.at[stage])

            copy_in_turn(steps, _STAGES, (k_consumed, v_consumed), fetch)

        @pl.when(warpgroup < warpgroups)
        def _compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            rows = pl.ds((block * warpgroups + warpgroup) * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head, query_head], q_s.at[warpgroup], q_loaded.at[warpgroup])
            plgpu.copy_gmem_to_smem(rows_ref.at[b, :, rows], rows_s.at[warpgroup], q_loaded.at[warpgroup])
            plgpu.barrier_wait(q_loaded.at[warpgroup])

            def of_rows(index: Array) -> Array:
                return over(plgpu.load(rows_s.at[warpgroup, index], layout=plgpu.Layout.WGMMA.reduce(1)), KEYS)

            def step(index: Array, before: Softmax) -> Softmax:
                stage, is_new = jax.lax.rem(index, _STAGES), index >= of_cache
                first_key = jnp.where(is_new, first_new + index - of_cache, first_cached + index) * KEYS
                plgpu.barrier_wait(k_loaded.at[stage])
                score = product(q_s.at[warpgroup], k_s.at[stage].T, KEYS) * (scale * LOG2_E)
                plgpu.barrier_arrive(k_consumed.at[stage])

                def masked(score: Array) -> Array:
                    start = jnp.where(is_new, 0, 2)
                    key = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=plgpu.Layout.WGMMA) + first_key
                    return jnp.where((key >= of_rows(start)) & (key < of_rows(start + 1)), score, MASKED)

                last_start, first_end = (jnp.where(is_new, a, b) for a, b in zip(new_whole, cached_whole, strict=True))
                seen_by_all = (first_key >= last_start) & (first_key + KEYS <= first_end)
                weight, (out, highest, total) = online_softmax(jax.lax.cond(seen_by_all, lambda score: score, masked, score), before, dtype)
                plgpu.barrier_wait(v_loaded.at[stage])
                out = add_product(out, weight, v_s.at[stage])
                plgpu.barrier_arrive(v_consumed.at[stage])
                return out, highest, total

            out_s[warpgroup], lse_s[warpgroup] = finish(jax.lax.fori_loop(0, steps, step, no_keys(h)))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s.at[warpgroup], out_ref.at[b, rows, head, query_head])
            plgpu.copy_smem_to_gmem(lse_s.at[warpgroup], lse_ref.at[b, head, query_head, rows])
            plgpu.wait_smem_to_gmem(0)

    return kernel(
        "flash_attention",
        body,
        out_type=(jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((B, K, G, T), jnp.float32)),
        # Neighbours share keys and values: the query heads of a KV head.
        grid=(B, K, blocks, G),
        grid_names=("row", "head", "block", "query_head"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((warpgroups, ROWS, h), dtype, transforms=tiles(64)),
            plgpu.SMEM((warpgroups, 2 if page_size is None else 4, ROWS), jnp.int32),
            plgpu.SMEM((_STAGES, KEYS, h), dtype, transforms=tiles(64)),
            plgpu.SMEM((_STAGES, KEYS, h), dtype, transforms=tiles(64)),
            plgpu.SMEM((warpgroups, ROWS, h), jnp.float32, transforms=tiles(32, 4)),
            plgpu.SMEM((warpgroups, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=warpgroups, num_arrivals=2),
            plgpu.Barrier(num_barriers=_STAGES),
            plgpu.Barrier(num_barriers=_STAGES),
            plgpu.Barrier(num_barriers=_STAGES, num_arrivals=warpgroups),
            plgpu.Barrier(num_barriers=_STAGES, num_arrivals=warpgroups),
        ],
    )

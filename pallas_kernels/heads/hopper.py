"""Heads on Hopper GPUs: one kernel that rotates, normalises and scales them, and writes keys and values to the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.heads.inputs import Heads, Pools, Targets
from pallas_kernels.implementations import require_hopper
from pallas_kernels.mosaic import ROWS, kernel, over, plgpu, product, tiles

MOST_BLOCKS = 2048
"""One for each token and KV head. More of them take longer than XLA's few kernels, which use memory better."""


def split_heads(heads: Heads) -> tuple[Float[Array, "B T K G h"], Float[Array, "B T K h"], Float[Array, "B T K h"]]:
    """One thread block for each token and KV head. Raises NotImplementedError for what the kernel does not take."""
    _require(heads)
    q_BTKGh, k_BTKh, v_BTKh = _kernel(heads, None)(*_operands(heads))
    return q_BTKGh, k_BTKh, v_BTKh


def write_heads[P: Pools](heads: Heads, pools: P, targets: Targets) -> tuple[Float[Array, "B T K G h"], P]:
    """As :func:`split_heads`; the pools are written in place."""
    _require(heads)
    if pools.k_PKph.dtype != heads.qkv_BTKgh.dtype:
        raise NotImplementedError(f"takes pools of the heads' dtype; they are {pools.k_PKph.dtype} and {heads.qkv_BTKgh.dtype}")
    refs = jax.new_ref(pools.k_PKph), jax.new_ref(pools.v_PKph)
    (q_BTKGh,) = _kernel(heads, pools)(*_operands(heads), targets.page_BT, targets.offset_BT, *refs)
    return q_BTKGh, dataclasses.replace(pools, k_PKph=jax.freeze(refs[0]), v_PKph=jax.freeze(refs[1]))


def _require(heads: Heads) -> None:
    require_hopper()
    B, T, K, g, h = heads.qkv_BTKgh.shape
    if heads.qkv_BTKgh.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"takes bfloat16 or float16; the heads are {heads.qkv_BTKgh.dtype}")
    if h not in (64, 128) or g > ROWS:
        raise NotImplementedError(f"takes head dimensions 64 and 128 and up to {ROWS - 2} query heads a KV head; these are {h} and {g - 2}")
    if B * T * K > MOST_BLOCKS:
        raise NotImplementedError(f"takes up to {MOST_BLOCKS} tokens times KV heads; there are {B * T * K}")


def _operands(heads: Heads) -> list[Array]:
    operands = [heads.qkv_BTKgh]
    if heads.angles is not None:
        operands += [jnp.repeat(angle_BTr, 2, axis=2) for angle_BTr in heads.angles]
    if heads.scale_BT is not None:
        operands.append(heads.scale_BT)
    return operands


def _kernel(heads: Heads, pools: Pools | None) -> Callable[..., tuple[Array, ...]]:
    """The kernel for such heads: (heads; cosines and sines; scales; with ``pools`` also target pages, target offsets and the pools) to the
    queries, and without ``pools`` the keys and values.
    """
    (B, T, K, g, h), dtype = heads.qkv_BTKgh.shape, heads.qkv_BTKgh.dtype
    rotated, scaled, eps = heads.angles is not None, heads.scale_BT is not None, heads.norm_eps

    def body(*given: Any) -> None:
        refs = iter(given)
        qkv_ref = next(refs)
        if rotated:
            cos_ref, sin_ref = next(refs), next(refs)
        if scaled:
            scale_ref = next(refs)
        if pools is not None:
            page_ref, offset_ref, k_pool_ref, v_pool_ref = (next(refs) for _ in range(4))
        q_ref = next(refs)
        if pools is None:
            k_ref, v_ref = next(refs), next(refs)
        heads_s, angles_s, swap_s, loaded = refs
        b, t, head = (jax.lax.axis_index(name) for name in ("row", "token", "head"))
        plgpu.copy_gmem_to_smem(qkv_ref.at[b, t, head], heads_s.at[pl.ds(0, g)], loaded)
        if rotated:
            plgpu.copy_gmem_to_smem(cos_ref.at[b, t], angles_s.at[0], loaded)
            plgpu.copy_gmem_to_smem(sin_ref.at[b, t], angles_s.at[1], loaded)
            for first in range(0, h, ROWS):
                row = plgpu.broadcasted_iota(jnp.int32, (ROWS, h), 0, layout=plgpu.Layout.WGMMA) + first
                column = plgpu.broadcasted_iota(jnp.int32, (ROWS, h), 1, layout=plgpu.Layout.WGMMA)
                # Times this matrix, each pair (even, odd) becomes (-odd, even).
                swap = jnp.where(column == (row ^ 1), jnp.where((row & 1) == 1, -1.0, 1.0), 0.0)
                swap_s[pl.ds(first, ROWS)] = swap.astype(dtype)
            plgpu.commit_smem()
        plgpu.barrier_wait(loaded)
        loaded_heads = plgpu.load(heads_s, layout=plgpu.Layout.WGMMA)
        x = loaded_heads.astype(jnp.float32)
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, h), 0, layout=plgpu.Layout.WGMMA)
        y = x
        if rotated:
            cos, sin = (
                jax.lax.broadcast_in_dim(plgpu.load(angles_s.at[i], layout=plgpu.Layout.WGMMA.reduce(0)), (ROWS, h), [1]) for i in range(2)
            )
            # Rounded before the norm, as in the model's definition.
            y = (x * cos + product(loaded_heads, swap_s, h) * sin).astype(dtype).astype(jnp.float32)
            if eps is not None:
                mean_square = jnp.sum(y * y, axis=1) * (1.0 / h)
                y = y * over(jax.lax.rsqrt(mean_square + eps), h)
            y = jnp.where(row < g - 1, y, x)  # the last row is the values
        if scaled:
            y = jnp.where(row < g - 2, y * scale_ref[b, t], y)
        heads_s[...] = y.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(heads_s.at[pl.ds(0, g - 2)], q_ref.at[b, t, head])
        key_s, value_s = heads_s.at[pl.ds(g - 2, 1)], heads_s.at[pl.ds(g - 1, 1)]
        if pools is None:
            plgpu.copy_smem_to_gmem(key_s, k_ref.at[b, t, pl.ds(head, 1)])
            plgpu.copy_smem_to_gmem(value_s, v_ref.at[b, t, pl.ds(head, 1)])
        else:
            page = page_ref[b, t]

            @pl.when(page < pools.k_PKph.shape[0])
            def _write() -> None:
                place = pl.ds(offset_ref[b, t], 1)
                plgpu.copy_smem_to_gmem(key_s, k_pool_ref.at[page, head, place])
                plgpu.copy_smem_to_gmem(value_s, v_pool_ref.at[page, head, place])

        plgpu.wait_smem_to_gmem(0)

    keys = jax.ShapeDtypeStruct((B, T, K, h), dtype)
    return kernel(
        "heads",
        body,
        out_type=(jax.ShapeDtypeStruct((B, T, K, g - 2, h), dtype), *([keys, keys] if pools is None else [])),
        grid=(B, T, K),
        grid_names=("row", "token", "head"),
        scratch_types=[
            plgpu.SMEM((ROWS, h), dtype),
            plgpu.SMEM((2, h), jnp.float32),
            plgpu.SMEM((h, h), dtype, transforms=tiles(64)),
            plgpu.Barrier(num_arrivals=3 if rotated else 1),
        ],
    )

"""Heads as XLA lowers them, on any device."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.heads.inputs import Heads, Pools, Targets
from pallas_kernels.norm import rms_normalize


def split_heads(heads: Heads) -> tuple[Float[Array, "B T K G h"], Float[Array, "B T K h"], Float[Array, "B T K h"]]:
    """Queries and keys are rotated and normalised together: both operations are per head."""
    qk_BTKgh, v_BTKh = heads.qkv_BTKgh[:, :, :, :-1], heads.qkv_BTKgh[:, :, :, -1]
    if heads.angles is not None:
        qk_BTKgh = rotate(qk_BTKgh, heads.angles)
        if heads.norm_eps is not None:
            qk_BTKgh = rms_normalize(qk_BTKgh, heads.norm_eps)
    q_BTKGh, k_BTKh = qk_BTKgh[:, :, :, :-1], qk_BTKgh[:, :, :, -1]
    if heads.scale_BT is not None:
        q_BTKGh = (q_BTKGh.astype(jnp.float32) * heads.scale_BT[:, :, None, None, None]).astype(q_BTKGh.dtype)
    return q_BTKGh, k_BTKh, v_BTKh


def write_heads[P: Pools](heads: Heads, pools: P, targets: Targets) -> tuple[Float[Array, "B T K G h"], P]:
    """A scatter of the keys, and one of the values."""
    q_BTKGh, k_BTKh, v_BTKh = split_heads(heads)
    return q_BTKGh, put(pools, k_BTKh, v_BTKh, targets)


def put[P: Pools](pools: P, k_BTKh: Float[Array, "B T K h"], v_BTKh: Float[Array, "B T K h"], targets: Targets) -> P:
    """Write each token's key and value to its target."""

    def scattered(pool_PKph: Array, new_BTKh: Array) -> Array:
        return pool_PKph.at[targets.page_BT, :, targets.offset_BT, :].set(new_BTKh.astype(pool_PKph.dtype), mode="drop")

    return dataclasses.replace(pools, k_PKph=scattered(pools.k_PKph, k_BTKh), v_PKph=scattered(pools.v_PKph, v_BTKh))


def rotate(
    x_BTKGh: Float[Array, "B T K G h"], angles: tuple[Float32[Array, "B T r"], Float32[Array, "B T r"]]
) -> Float[Array, "B T K G h"]:
    """Rotate the pairs (0, 1), (2, 3), ... of the last axis, in float32; the result has ``x``'s dtype."""
    cos, sin = (a[:, :, None, None, :] for a in angles)
    pairs = x_BTKGh.astype(jnp.float32).reshape(*x_BTKGh.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = jnp.broadcast_to(cos, even.shape), jnp.broadcast_to(sin, even.shape)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x_BTKGh.shape).astype(x_BTKGh.dtype)

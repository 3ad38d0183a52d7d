"""Grouped-query attention as Llama 3 and Llama 4 have it, over cached and new tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from l4jax.cache import LayerCache, PageTables, is_local, write
from l4jax.config import ModelConfig
from l4jax.model.norm import rms_normalize
from l4jax.model.rotary import rotary_angles, rotate
from l4jax.model.weights import WeightSpec, declare
from pallas_kernels.flash_attention import attend, attend_pages
from sharding.merge import merge_attention
from sharding.mesh import MeshSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyIntervals:
    """What each new token attends in one kind of layer, and where that layer keeps it.

    ``cached_end_BT``: cache slots [0, end). ``new_start_BT``, ``new_end_BT``: the step's own tokens [start, end).
    ``slot_BT``: the slot that the token's key is written to, -1 where it is not kept.
    """

    cached_end_BT: Int32[Array, "B T"]
    new_start_BT: Int32[Array, "B T"]
    new_end_BT: Int32[Array, "B T"]
    slot_BT: Int32[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What every layer of one step shares: rotation angles, query temperature, intervals and page tables."""

    angles: tuple[Float32[Array, "B T i"], Float32[Array, "B T i"]]
    temperature_BT: Float32[Array, "B T"]
    full: KeyIntervals
    local: KeyIntervals
    tables: PageTables


def full_intervals(start_B: Int32[Array, "B"], new_B: Int32[Array, "B"], T: int) -> KeyIntervals:
    """Plain causal attention: everything cached, and the new tokens up to oneself."""
    index_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
    start_B1 = start_B[:, None]
    shape = (start_B.shape[0], T)
    return KeyIntervals(
        cached_end_BT=jnp.broadcast_to(start_B1, shape),
        new_start_BT=jnp.zeros(shape, jnp.int32),
        new_end_BT=jnp.broadcast_to(index_1T + 1, shape),
        slot_BT=jnp.where(index_1T < new_B[:, None], start_B1 + index_1T, -1),
    )


def local_intervals(start_B: Int32[Array, "B"], new_B: Int32[Array, "B"], T: int, chunk: int) -> KeyIntervals:
    """Chunk-local causal attention: position q sees k when ``k <= q`` and ``k // chunk == q // chunk``."""
    index_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
    start_B1 = start_B[:, None]
    position_BT = start_B1 + index_1T
    chunk_start_BT = position_BT // chunk * chunk
    # Of the tokens written now, only those of the last one's chunk are kept: an earlier chunk is never looked at again,
    # and its slots are the later chunk's.
    last_B1 = start_B1 + new_B[:, None] - 1
    kept_BT = (index_1T < new_B[:, None]) & (position_BT >= last_B1 // chunk * chunk)
    return KeyIntervals(
        cached_end_BT=jnp.maximum(start_B1 - chunk_start_BT, 0),
        new_start_BT=jnp.maximum(chunk_start_BT - start_B1, 0),
        new_end_BT=jnp.broadcast_to(index_1T + 1, position_BT.shape),
        slot_BT=jnp.where(kept_BT, position_BT % chunk, -1),
    )


def attention_temperature(config: ModelConfig, position_BT: Int32[Array, "B T"]) -> Float32[Array, "B T"]:
    """Query scale of the NoPE layers: ``1 + attn_scale * ln(floor((position + 1) / floor_scale) + 1)``.

    The bucket is an integer division: in bfloat16 it is wrong from position 8176 on. (Scalable-Softmax, arXiv 2501.19399.)
    """
    bucket = (position_BT + 1) // config.floor_scale
    return 1.0 + config.attn_scale * jnp.log(bucket.astype(jnp.float32) + 1.0)


def step_inputs(config: ModelConfig, start_B: Int32[Array, "B"], new_B: Int32[Array, "B"], T: int, tables: PageTables) -> StepInputs:
    """For ``new_B[b]`` tokens (padded to T) that follow the ``start_B[b]`` cached ones in row ``b``."""
    position_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    full = full_intervals(start_B, new_B, T)
    chunk = config.attention_chunk_size
    return StepInputs(
        angles=rotary_angles(config, position_BT),
        temperature_BT=attention_temperature(config, position_BT),
        full=full,
        local=full if chunk is None else local_intervals(start_B, new_B, T, chunk),
        tables=tables,
    )


class Attention(nnx.Module):
    """One layer's attention.

    A RoPE layer rotates queries and keys, then (Llama 4 Scout) RMS-normalises each head of both, after the rotation. A
    NoPE layer does neither; with attention temperature it scales its queries by position. Softmax scale is
    ``head_dim ** -0.5`` in every case.

    The query, key and value projections are one matrix, grouped by KV head: its G query heads, its key, its value. On a mesh,
    each device along ``tensor`` has some of the groups.
    """

    def __init__(self, config: ModelConfig, layer: int, mesh: MeshSpec) -> None:
        K, h, D = config.num_kv_heads, config.head_dim, config.hidden_size
        G = config.num_heads // K
        self.config = config
        self.heads = mesh.along("tensor")
        self.uses_rope = config.rope_layers[layer]
        self.is_local = is_local(config, layer)
        self.qkv = declare(WeightSpec((K, G + 2, h, D), ("kv_heads", None, "head_dim", "embed"), fan_in=D))
        self.out = declare(WeightSpec((D, K, G, h), ("embed", "kv_heads", None, "head_dim"), fan_in=K * G * h))

    def __call__(self, x_BTD: Float[Array, "B T D"], step: StepInputs, cache: LayerCache) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Attention of the new tokens, projected back to the model width, and the cache with their keys and values in it."""
        B, T, D = x_BTD.shape
        K, groups, h, _ = self.qkv.shape
        qkv = jnp.einsum("btd,fd->btf", x_BTD, self.qkv[...].reshape(-1, D)).reshape(B, T, K, groups, h)
        # Queries and keys go through rotation and norm together: both are per head.
        qk_BTKgh, v_BTKh = qkv[:, :, :, :-1], qkv[:, :, :, -1]
        if self.uses_rope:
            qk_BTKgh = rotate(qk_BTKgh, step.angles)
            if self.config.use_qk_norm:
                qk_BTKgh = rms_normalize(qk_BTKgh, self.config.rms_norm_eps)
        q_BTKGh, k_BTKh = qk_BTKgh[:, :, :, :-1], qk_BTKgh[:, :, :, -1]
        query_scale_BT = jnp.full((B, T), h**-0.5, jnp.float32)
        if not self.uses_rope and self.config.attn_temperature_tuning:
            query_scale_BT = query_scale_BT * step.temperature_BT
        q_BTKGh = (q_BTKGh.astype(jnp.float32) * query_scale_BT[:, :, None, None, None]).astype(x_BTD.dtype)

        keys, pages_BW = (step.local, step.tables.local_BW) if self.is_local else (step.full, step.tables.full_BW)
        no_start_BT = jnp.zeros_like(keys.cached_end_BT)
        cached = attend_pages(q_BTKGh, cache.k_PKph, cache.v_PKph, pages_BW, no_start_BT, keys.cached_end_BT)
        new = attend(q_BTKGh, k_BTKh, v_BTKh, keys.new_start_BT, keys.new_end_BT)
        attended_BTKGh, _ = merge_attention([cached, new])

        # The pages must be read before they are overwritten. Said as a data dependence, it lets XLA write in place.
        attended_BTKGh, k_BTKh, v_BTKh = jax.lax.optimization_barrier((attended_BTKGh, k_BTKh, v_BTKh))
        cache = write(cache, k_BTKh, v_BTKh, pages_BW, keys.slot_BT)
        attended_BTf = attended_BTKGh.astype(x_BTD.dtype).reshape(B, T, -1)
        return self.heads.sum(jnp.einsum("btf,df->btd", attended_BTf, self.out[...].reshape(D, -1))), cache

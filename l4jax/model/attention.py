"""Grouped-query attention of Llama 3 and Llama 4, over cached and new tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from l4jax.cache import LayerCache, TreeCache, is_local, read, write
from l4jax.config import ModelConfig
from l4jax.model.norm import rms_normalize
from l4jax.model.packed import PackedCache, attend_packed
from l4jax.model.rotary import rotate
from l4jax.model.step import KeyIntervals, PackedKeys, RingKeys, Spread, StepInputs, TreeKeys
from l4jax.model.weights import WeightSpec, declare
from pallas_kernels import keys as kernel_keys
from pallas_kernels.flash_attention import attend, attend_pages
from pallas_kernels.keys import Interval, PagedKeys
from pallas_kernels.matmul import matmul
from pallas_kernels.merge import Partial, merge_attention
from pallas_kernels.tree_attention import tree_attention
from sharding.mesh import MeshSpec
from sharding.ring import attend_positions, pass_kv, pass_q


class Attention(nnx.Module):
    """One layer's attention.

    A RoPE layer rotates queries and keys; after the rotation, Llama 4 Scout RMS-normalises each head of both. A NoPE layer does
    neither; with attention temperature it scales its queries by position. The softmax scale is ``head_dim ** -0.5`` in both.

    The query, key and value projections are one matrix, grouped by KV head: its G query heads, its key, its value. On a mesh,
    each device along ``tensor`` has some of the groups, and each token rank caches some of the keys.
    """

    def __init__(self, config: ModelConfig, layer: int, mesh: MeshSpec, *, input_size: int | None = None) -> None:
        """``input_size``: the width of the input, if it is not the model's."""
        K, h, D = config.num_kv_heads, config.head_dim, config.hidden_size
        G = config.num_heads // K
        width = input_size or D
        self.config = config
        self.scale = config.head_dim**-0.5
        self.head_ranks, self.ranks = mesh.along("tensor"), mesh.token_ranks
        self.uses_rope = config.rope_layers[layer]
        self.is_local = is_local(config, layer)
        self.qkv = declare(WeightSpec((K, G + 2, h, width), ("kv_heads", None, "head_dim", "embed"), fan_in=width))
        self.out = declare(WeightSpec((D, K, G, h), ("embed", "kv_heads", None, "head_dim"), fan_in=K * G * h))

    def __call__(
        self,
        x_BTi: Float[Array, "B T i"],
        step: StepInputs,
        cache: LayerCache | TreeCache | PackedCache,
        spread: Spread | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Attention of the new tokens, projected to the model width; also returns the cache with their keys and values added.

        Nodes of a draft tree need a :class:`TreeCache`, training's packed sequences a :class:`PackedCache`, other tokens a
        :class:`LayerCache`; the cache is returned as the same kind.
        """
        B, T, width = x_BTi.shape
        K, groups, h, _ = self.qkv.shape
        qkv = matmul(x_BTi, self.qkv[...].reshape(-1, width)).reshape(B, T, K, groups, h)
        # Queries and keys are rotated and normalised together: both operations are per head.
        qk_BTKgh, v_BTKh = qkv[:, :, :, :-1], qkv[:, :, :, -1]
        if self.uses_rope:
            qk_BTKgh = rotate(qk_BTKgh, step.angles)
            if self.config.use_qk_norm:
                qk_BTKgh = rms_normalize(qk_BTKgh, self.config.rms_norm_eps)
        q_BTKGh, k_BTKh = qk_BTKgh[:, :, :, :-1], qk_BTKgh[:, :, :, -1]
        if not self.uses_rope and self.config.attn_temperature_tuning:
            q_BTKGh = (q_BTKGh.astype(jnp.float32) * step.temperature_BT[:, :, None, None, None]).astype(x_BTi.dtype)

        keys, pages_BW = (step.local, step.tables.local_Bw) if self.is_local else (step.full, step.tables.full_BW)
        if isinstance(keys, TreeKeys):
            assert isinstance(cache, TreeCache)
            cache = cache.extended(k_BTKh, v_BTKh)
            attended_BTKGh = self._tree(q_BTKGh, cache, keys, pages_BW, apart=step.tables.rows_apart)
        elif isinstance(keys, PackedKeys):
            assert isinstance(cache, PackedCache)
            cache = cache.extended(k_BTKh, v_BTKh)
            attended_BTKGh = attend_packed(q_BTKGh, cache, keys, scale=self.scale)
        else:
            assert isinstance(cache, LayerCache)
            if isinstance(keys, RingKeys):
                assert spread is not None
                attended_BTKGh = self._ring(q_BTKGh, k_BTKh, v_BTKh, cache, keys, step, spread)
            else:
                apart = step.tables.rows_apart
                attended_BTKGh = self._replicated(q_BTKGh, k_BTKh, v_BTKh, cache, keys, pages_BW, apart=apart)
            attended_BTKGh = attended_BTKGh.astype(x_BTi.dtype)  # in the kernel that computes it: none is fused over the barrier
            # The pages must be read before they are overwritten. Because the barrier makes this a data dependence, XLA writes in place.
            attended_BTKGh, k_BTKh, v_BTKh = jax.lax.optimization_barrier((attended_BTKGh, k_BTKh, v_BTKh))
            if isinstance(keys, RingKeys) and keys.send_RBC is not None:
                k_BTKh, v_BTKh = self._exchange(k_BTKh, v_BTKh, keys.send_RBC)
            cache = write(cache, k_BTKh, v_BTKh, pages_BW, keys.slot_BA if isinstance(keys, RingKeys) else keys.slot_BT)
        attended_BTf = attended_BTKGh.astype(x_BTi.dtype).reshape(B, T, -1)
        out_Df = self.out[...].reshape(self.out.shape[0], -1)
        return self.head_ranks.sum(matmul(attended_BTf, out_Df)), cache

    def _tree(self, q_BNKGh: Array, cache: TreeCache, keys: TreeKeys, pages_BW: Array, *, apart: bool) -> Float[Array, "B N K G h"]:
        """Attention of tree nodes: every rank has all nodes' keys, which only rank 0 attends to, and its own part of the cached keys."""
        prefix = PagedKeys(cache.layer.k_PKph, cache.layer.v_PKph, pages_BW, Interval(keys.cached_start_BN, keys.cached_end_BN))
        nodes = kernel_keys.TreeKeys(cache.k_BSKh, cache.v_BSKh, keys.sees_BNS)
        return self._merge_ranks(tree_attention(q_BNKGh, nodes, prefix, scale=self.scale, apart=apart))

    def _merge_ranks(self, partial: Partial) -> Float[Array, "B T K G h"]:
        """Merge every rank's partial attention."""
        if self.ranks.count == 1:
            return partial[0]
        # Output and log-sum-exp are gathered in one message.
        gathered = self.ranks.gather(jnp.concatenate([partial[0], partial[1][..., None]], axis=-1))
        return merge_attention([(part[..., :-1], part[..., -1]) for part in gathered])[0]

    def _replicated(
        self, q_BTKGh: Array, k_BTKh: Array, v_BTKh: Array, cache: LayerCache, keys: KeyIntervals, pages_BW: Array, *, apart: bool
    ) -> Float[Array, "B T K G h"]:
        """Attention of replicated tokens: every rank has all new tokens and its own part of the cached keys."""
        prefix = PagedKeys(cache.k_PKph, cache.v_PKph, pages_BW, Interval(keys.cached_start_BT, keys.cached_end_BT))
        # Every rank has the new tokens' keys. Only rank 0 attends to them, so that they enter the merged result once.
        new_end_BT = jnp.where(self.ranks.index() == 0, keys.new_end_BT, 0)
        if q_BTKGh.shape[1] == 1:
            token = kernel_keys.TreeKeys(k_BTKh, v_BTKh, (keys.new_start_BT < new_end_BT)[:, :, None])
            return self._merge_ranks(tree_attention(q_BTKGh, token, prefix, scale=self.scale, apart=apart))
        cached = attend_pages(q_BTKGh, prefix, scale=self.scale, apart=apart)
        new = attend(q_BTKGh, k_BTKh, v_BTKh, keys.new_start_BT, new_end_BT, scale=self.scale)
        return self._merge_ranks(merge_attention([cached, new]))

    def _ring(
        self, q_BTKGh: Array, k_BTKh: Array, v_BTKh: Array, cache: LayerCache, keys: RingKeys, step: StepInputs, spread: Spread
    ) -> Float[Array, "B T K G h"]:
        """Attention of spread tokens: each rank has some of the new tokens and its own part of the cached keys."""
        assert step.position_RBT is not None
        chunk = self.config.attention_chunk_size if self.is_local else None
        if self.is_local and spread.aligned:
            position_BT = step.position_RBT[self.ranks.index()]
            return attend_positions(q_BTKGh, jnp.stack([k_BTKh, v_BTKh]), position_BT, position_BT, chunk, keys.window, scale=self.scale)[0]
        segments: tuple[int, ...] = (k_BTKh.shape[1],)
        if keys.cached_BW.shape[1] > 0:
            cached_k_BSKh, cached_v_BSKh = read(cache, keys.cached_BW)
            segments = (cached_k_BSKh.shape[1], *segments)
            k_BTKh, v_BTKh = jnp.concatenate([cached_k_BSKh, k_BTKh], axis=1), jnp.concatenate([cached_v_BSKh, v_BTKh], axis=1)
        ring = pass_kv if spread.variant == "pass_kv" else pass_q
        positions = (step.position_RBT, keys.key_position_RBS)
        options = {"axis_name": self.ranks.axes, "scale": self.scale, "chunk": chunk, "window": keys.window, "segments": segments}
        return ring(q_BTKGh, k_BTKh, v_BTKh, *positions, **options)[0]

    def _exchange(self, k_BTKh: Array, v_BTKh: Array, send_RBC: Array) -> tuple[Array, Array]:
        """Send new keys and values to the ranks that cache them; returns those that arrive here, [B, A, K, h] each."""
        kv_BT2Kh = jnp.stack([k_BTKh, v_BTKh], axis=2)
        leaving = jax.vmap(lambda index_BC: jnp.take_along_axis(kv_BT2Kh, index_BC[:, :, None, None, None], axis=1))(send_RBC)
        arriving = jax.lax.all_to_all(leaving, self.ranks.axes, split_axis=0, concat_axis=0)
        R, B, C, _, K, h = arriving.shape
        kv_BA2Kh = jnp.swapaxes(arriving, 0, 1).reshape(B, R * C, 2, K, h)
        return kv_BA2Kh[:, :, 0], kv_BA2Kh[:, :, 1]

"""Grouped-query attention of Llama 3 and Llama 4, over cached and new tokens."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from l4jax.cache import LayerCache, TreeCache, is_local
from l4jax.config import ModelConfig
from l4jax.model.steps.inputs import StepInputs
from l4jax.model.steps.packed import PackedCache
from l4jax.model.weights import WeightSpec, declare
from pallas_kernels.heads import Heads
from pallas_kernels.matmul import matmul
from sharding.mesh import MeshSpec


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
        self, x_BTi: Float[Array, "B T i"], step: StepInputs, cache: LayerCache | TreeCache | PackedCache
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Attention of the new tokens, projected to the model width; also returns the cache with their keys and values added.

        Nodes of a draft tree need a :class:`TreeCache`, training's packed sequences a :class:`PackedCache`, other tokens a
        :class:`LayerCache`; the cache is returned as the same kind.
        """
        B, T, width = x_BTi.shape
        K, groups, h, _ = self.qkv.shape
        qkv_BTKgh = matmul(x_BTi, self.qkv[...].reshape(-1, width)).reshape(B, T, K, groups, h)
        heads = Heads(
            qkv_BTKgh,
            angles=step.angles if self.uses_rope else None,
            scale_BT=step.temperature_BT if self.config.attn_temperature_tuning and not self.uses_rope else None,
            norm_eps=self.config.rms_norm_eps if self.config.use_qk_norm and self.uses_rope else None,
        )
        keys = step.local if self.is_local else step.full
        attended_BTKGh, cache = keys.attend(heads, cache, self.ranks, scale=self.scale)
        attended_BTf = attended_BTKGh.reshape(B, T, -1)
        out_Df = self.out[...].reshape(self.out.shape[0], -1)
        return self.head_ranks.sum(matmul(attended_BTf, out_Df)), cache

"""The decoder: embedding, layers, final norm and output head."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from l4jax.cache import LayerCache, PageTables
from l4jax.config import ModelConfig
from l4jax.model.attention import Attention
from l4jax.model.feed_forward import MixtureOfExperts, SwiGLU
from l4jax.model.norm import RMSNorm
from l4jax.model.step import PieceLayout, Spread, StepInputs, spread_step_inputs, step_inputs, tokens_at
from l4jax.model.weights import WeightSpec, declare
from sharding.mesh import ONE_DEVICE, MeshSpec


class DecoderLayer(nnx.Module):
    """Pre-norm residual block: attention, then a dense or mixture-of-experts feed-forward."""

    def __init__(self, config: ModelConfig, layer: int, mesh: MeshSpec) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer, mesh)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        has_experts = config.moe is not None and config.moe.moe_layers[layer]
        if config.moe is not None and has_experts:
            self.feed_forward: MixtureOfExperts | SwiGLU = MixtureOfExperts(config.hidden_size, config.moe, mesh)
        else:
            self.feed_forward = SwiGLU(config.hidden_size, config.intermediate_size, mesh)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], step: StepInputs, cache: LayerCache, spread: Spread | None
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """The layer's output, residuals included, and its cache with the new tokens in it."""
        with jax.named_scope("attention"):
            attended_BTD, cache = self.attention(self.attention_norm(x_BTD), step, cache, spread)
        x_BTD = x_BTD + attended_BTD
        with jax.named_scope("feed_forward"):
            normed_BTD = self.feed_forward_norm(x_BTD)
            if isinstance(self.feed_forward, MixtureOfExperts):
                x_BTD = x_BTD + self.feed_forward(normed_BTD, step.valid_BT, spread=spread is not None)
            else:
                x_BTD = x_BTD + self.feed_forward(normed_BTD)
        if spread is not None:
            # New keys go to the ranks that cache them while the feed-forward computes: XLA would put all layers' off to the last one.
            x_BTD, cache = jax.lax.optimization_barrier((x_BTD, cache))
        return x_BTD, cache


class Llama(nnx.Module):
    """A Llama 3 or Llama 4 text decoder. Its weights are abstract until bound (see ``l4jax.programs``).

    On a mesh it is called inside ``jax.shard_map``, with each device's share of weights, rows and cache.
    """

    def __init__(self, config: ModelConfig, mesh: MeshSpec = ONE_DEVICE) -> None:
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        self.mesh = mesh
        self.vocab, self.ranks = mesh.along("tensor"), mesh.token_ranks
        self.embed = declare(WeightSpec((V, D), ("vocab", "embed")))
        self.layers = nnx.List([DecoderLayer(config, i, mesh) for i in range(config.num_layers)])
        self.norm = RMSNorm(D, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = declare(WeightSpec((V, D), ("vocab", "embed"), fan_in=D))

    def __call__(
        self,
        token_BT: Int32[Array, "B T"],
        start_B: Int32[Array, "B"],
        new_B: Int32[Array, "B"],
        cache: Sequence[LayerCache],
        tables: PageTables,
        layout: PieceLayout | None = None,
        spread: Spread | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[LayerCache, ...]]:
        """Hidden states after the final norm, and the cache with the new tokens' keys and values in it.

        Row ``b`` has ``start_B[b]`` tokens in the cache and gets ``new_B[b]`` more, the first ones of ``token_BT[b]``;
        the states of the padding after them mean nothing. With a ``layout``, each rank along ``sequence`` takes the tokens
        that it says, and the states are those.
        """
        if layout is None:
            step = step_inputs(self.config, start_B, new_B, token_BT.shape[1], tables, self.ranks)
        else:
            assert spread is not None
            step = spread_step_inputs(self.config, layout, start_B, tables, self.ranks, aligned=spread.aligned)
            token_BT = tokens_at(token_BT, layout.position_NBT[self.ranks.index()], start_B)
        with jax.named_scope("embed"):
            x_BTD = self._embed(token_BT)
        written = []
        for index, (layer, layer_cache) in enumerate(zip(self.layers, cache, strict=True)):
            with jax.named_scope(f"layer_{index}"):
                x_BTD, layer_cache = layer(x_BTD, step, layer_cache, spread)
                written.append(layer_cache)
        return self.norm(x_BTD), tuple(written)

    def _embed(self, token_BT: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        table_VD = self.embed[...]
        if self.vocab.count == 1:
            return table_VD[token_BT]
        # Each rank looks up its own tokens; to index a table that is cut would have it gathered whole.
        local_BT = token_BT - self.vocab.index() * table_VD.shape[0]
        inside_BT = (local_BT >= 0) & (local_BT < table_VD.shape[0])
        x_BTD = table_VD[jnp.where(inside_BT, local_BT, 0)]
        return self.vocab.sum(jnp.where(inside_BT[:, :, None], x_BTD, jnp.zeros((), x_BTD.dtype)))

    def logits(self, x_BTD: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        """Next-token logits of final hidden states, in float32; on a mesh, those of this rank's part of the vocabulary."""
        with jax.named_scope("head"):
            table_VD = self.embed[...] if self.config.tie_word_embeddings else self.head[...]
            return jnp.einsum("...d,vd->...v", x_BTD, table_VD, preferred_element_type=jnp.float32)

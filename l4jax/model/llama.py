"""The decoder: embedding, layers, final norm and output head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from l4jax.cache import LayerCache, PageTables, TreeCache, is_local
from l4jax.config import ModelConfig
from l4jax.model.attention import Attention
from l4jax.model.feed_forward import MixtureOfExperts, SwiGLU
from l4jax.model.norm import RMSNorm
from l4jax.model.steps.inputs import StepInputs
from l4jax.model.steps.packed import PackedCache, packed_step
from l4jax.model.steps.replicated import full_intervals, local_intervals, replicated_step
from l4jax.model.steps.spread import PieceLayout, Spread, spread_step, tokens_at
from l4jax.model.steps.tree import tree_step
from l4jax.model.weights import WeightSpec, declare
from pallas_kernels.matmul import matmul
from sharding.mesh import ONE_DEVICE, MeshSpec
from sharding.ranks import Ranks, local_index


class DecoderLayer(nnx.Module):
    """Pre-norm residual block: attention, then a dense or mixture-of-experts feed-forward.

    A layer returns the residual stream and its feed-forward's output separately. The next norm adds them, so that the sum and the norm can
    be one kernel.

    ``attention_normed`` is False for the first layer of most EAGLE-1 drafters, which has no norm before its attention.
    """

    def __init__(self, config: ModelConfig, layer: int, mesh: MeshSpec, *, attention_normed: bool = True) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if attention_normed else None
        self.attention = Attention(config, layer, mesh)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        has_experts = config.moe is not None and config.moe.moe_layers[layer]
        if config.moe is not None and has_experts:
            self.feed_forward: MixtureOfExperts | SwiGLU = MixtureOfExperts(config.hidden_size, config.moe, mesh)
        else:
            self.feed_forward = SwiGLU(config.hidden_size, config.intermediate_size, mesh)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        update_BTD: Float[Array, "B T D"] | None,
        step: StepInputs,
        cache: LayerCache | TreeCache | PackedCache,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Any]:
        """The residual stream, its update by this layer's feed-forward, and the cache, of the kind given, with the new tokens in it.

        The layer's input is ``x + update``; None: no update.
        """
        with jax.named_scope("attention"):
            if self.attention_norm is not None:
                x_BTD, normed_BTD = self.attention_norm.add_norm(x_BTD, update_BTD)
            else:
                x_BTD = normed_BTD = x_BTD if update_BTD is None else x_BTD + update_BTD
            attended_BTD, cache = self.attention(normed_BTD, step, cache)
        with jax.named_scope("feed_forward"):
            x_BTD, normed_BTD = self.feed_forward_norm.add_norm(x_BTD, attended_BTD)
            if isinstance(self.feed_forward, MixtureOfExperts):
                update_BTD = self.feed_forward(normed_BTD, step.valid_BT, spread=step.spread)
            else:
                update_BTD = self.feed_forward(normed_BTD)
        if step.spread:
            # Send new keys to the ranks that cache them while the feed-forward computes. Without the barrier XLA would send every
            # layer's keys at the last layer.
            x_BTD, update_BTD, cache = jax.lax.optimization_barrier((x_BTD, update_BTD, cache))
        return x_BTD, update_BTD, cache


class Llama(nnx.Module):
    """A Llama 3 or Llama 4 text decoder. Its weights are abstract until bound (see ``l4jax.programs``).

    On a mesh it is called inside ``jax.shard_map``, with each device's share of weights, rows and cache.

    ``taps``: indices of the layers whose input a drafter reads (``num_layers`` means the last layer's output). Besides its final hidden
    states, every call returns the features that a drafter reads: those inputs side by side, or, without taps, the final states.
    """

    def __init__(self, config: ModelConfig, mesh: MeshSpec = ONE_DEVICE, *, taps: Sequence[int] = ()) -> None:
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        self.taps = tuple(taps)
        self.mesh = mesh
        self.vocab_ranks, self.ranks = mesh.along("tensor"), mesh.token_ranks
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
    ) -> tuple[Float[Array, "B t D"], Float[Array, "B t f"], tuple[LayerCache, ...]]:
        """Hidden states after the final norm, the features that a drafter reads, and the cache with the new tokens' keys and values.

        Row ``b`` has ``start_B[b]`` tokens in the cache and adds ``new_B[b]`` more, the first tokens of ``token_BT[b]``; the states
        of the padding after them are meaningless. With a ``layout``, each token rank computes, and returns states of, only the
        tokens that the layout gives it.
        """
        if layout is None:
            step = replicated_step(self.config, start_B, new_B, token_BT.shape[1], tables, self.ranks)
        else:
            assert spread is not None
            step = spread_step(self.config, layout, spread, start_B, tables, self.ranks)
            token_BT = tokens_at(token_BT, layout.position_RBT[self.ranks.index()], start_B)
        return self._layers(token_BT, step, cache)

    def tree(
        self,
        token_BN: Int32[Array, "B N"],
        start_B: Int32[Array, "B"],
        depth_BN: Int32[Array, "B N"],
        valid_BN: Bool[Array, "B N"],
        sees_BNN: Bool[Array, "B N N"],
        cache: Sequence[LayerCache],
        tables: PageTables,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B N f"], tuple[TreeCache, ...]]:
        """As :meth:`__call__`, for the nodes of draft trees; the root in row ``b`` follows the ``start_B[b]`` cached tokens.

        ``sees_BNN[b, n]`` marks node ``n``'s ancestors and itself. The cache is returned unchanged, with the nodes' keys and values
        beside it.
        """
        step = tree_step(self.config, start_B, depth_BN, valid_BN, sees_BNN, tables, self.ranks)
        return self._layers(token_BN, step, [TreeCache.around(layer, len(token_BN)) for layer in cache])

    def packed(self, token_BT: Int32[Array, "B T"], first_BT: Int32[Array, "B T"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T f"]]:
        """Final hidden states and a drafter's features of sequences packed into rows; ``first_BT``: where each token's sequence begins."""
        step = packed_step(self.config, first_BT)
        final_BTD, feature_BTf, _ = self._layers(token_BT, step, [PackedCache()] * self.config.num_layers)
        return final_BTD, feature_BTf

    def accept(
        self,
        nodes: Sequence[TreeCache],
        node_BT: Int32[Array, "B T"],
        start_B: Int32[Array, "B"],
        new_B: Int32[Array, "B"],
        tables: PageTables,
    ) -> tuple[LayerCache, ...]:
        """Append the first ``new_B[b]`` of these nodes to the ``start_B[b]`` tokens in the cache, and forget the others."""
        T, chunk = node_BT.shape[1], self.config.attention_chunk_size
        full = (tables.full_BW, full_intervals(start_B, new_B, T, self.ranks).slot_BT)
        local = full if chunk is None else (tables.local_Bw, local_intervals(start_B, new_B, T, chunk, self.ranks).slot_BT)
        return tuple(layer.accepted(node_BT, *(local if is_local(self.config, i) else full)) for i, layer in enumerate(nodes))

    def _layers(
        self, token_BT: Array, step: StepInputs, cache: Sequence[LayerCache | TreeCache | PackedCache]
    ) -> tuple[Array, Array, tuple[Any, ...]]:
        x_BTD, update_BTD = self.embedding(token_BT), None
        inputs: list[tuple[Array, Array | None]] = [(x_BTD, update_BTD)]
        written = []
        for index, (layer, layer_cache) in enumerate(zip(self.layers, cache, strict=True)):
            with jax.named_scope(f"layer_{index}"):
                x_BTD, update_BTD, layer_cache = layer(x_BTD, update_BTD, step, layer_cache)
                written.append(layer_cache)
                inputs.append((x_BTD, update_BTD))
        _, final_BTD = self.norm.add_norm(x_BTD, update_BTD)
        tapped = [x_BTD if update_BTD is None else x_BTD + update_BTD for x_BTD, update_BTD in (inputs[tap] for tap in self.taps)]
        feature_BTf = jnp.concatenate(tapped, axis=-1) if self.taps else final_BTD
        return final_BTD, feature_BTf, tuple(written)

    def embedding(self, token_BT: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look up the tokens' embeddings."""
        with jax.named_scope("embed"):
            return embed(self.embed[...], token_BT, self.vocab_ranks)

    def logits(self, x_BTD: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        """Next-token logits of final hidden states, in float32; on a mesh, over this rank's part of the vocabulary."""
        with jax.named_scope("head"):
            return matmul(x_BTD, self.output_table, dtype=jnp.dtype(jnp.float32))

    @property
    def output_table(self) -> Float[Array, "V D"]:
        """The output head's weight: its own, or the embedding's if they are tied."""
        return getattr(self, self.config.output_weight)[...]


def embed(table_VD: Float[Array, "V D"], token_BT: Int32[Array, "B T"], vocab_ranks: Ranks) -> Float[Array, "B T D"]:
    """Look up the tokens' rows in a table that is sharded over ``vocab_ranks``."""
    if vocab_ranks.count == 1:
        return table_VD[token_BT]
    # Each rank looks up its own tokens: indexing the sharded table would gather all of it.
    index_BT = local_index(token_BT, table_VD.shape[0], vocab_ranks)
    x_BTD = table_VD.at[index_BT].get(mode="fill", fill_value=0)
    return vocab_ranks.sum(x_BTD)

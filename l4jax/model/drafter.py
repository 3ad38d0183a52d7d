"""EAGLE drafters: small decoders that guess the target's next tokens from its hidden states.

A drafter's i-th entry joins the target's hidden state at position i with the token that follows, x_{i+1}, and is cached at position i
of the drafter's own KV cache. Its output predicts the target's state at i + 1, from which x_{i+2} is guessed. At positions that the
target has not computed yet, the drafter's own output takes the place of the target's state.

EAGLE-1: arXiv 2401.15077, and with dense Llama 4 layers arXiv 2508.08192. EAGLE-3: arXiv 2503.01840.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from l4jax.cache import LayerCache, TreeCache
from l4jax.config import DrafterConfig, Eagle1Config, Eagle3Config
from l4jax.model.attention import Attention
from l4jax.model.feed_forward import SwiGLU
from l4jax.model.llama import DecoderLayer, Llama, embed
from l4jax.model.norm import RMSNorm
from l4jax.model.steps.inputs import StepInputs
from l4jax.model.steps.packed import PackedCache
from l4jax.model.weights import Weight, WeightSpec, declare
from pallas_kernels.matmul import matmul
from sharding.mesh import ONE_DEVICE, MeshSpec

Caches = Sequence[LayerCache | TreeCache | PackedCache]


class Drafter(nnx.Module):
    """What both versions share. Hidden states have the drafter's width; :meth:`read` makes them from the target's features."""

    def __init__(self, config: DrafterConfig, mesh: MeshSpec) -> None:
        self.config = config
        self.vocab_ranks, self.ranks = mesh.along("tensor"), mesh.token_ranks
        self.fuse: Weight
        self.reduced_vocabulary = False
        if config.own_embedding:
            self.embed = declare(WeightSpec((config.decoder.vocab_size, config.decoder.hidden_size), ("vocab", "embed")))

    def read(self, feature_BTf: Float[Array, "B T f"]) -> Float[Array, "B T D"]:
        """Turn the target's features (what a :class:`Llama` with this drafter's taps returns) into the drafter's hidden state."""
        raise NotImplementedError

    def __call__(
        self,
        target: Llama,
        token_BT: Int32[Array, "B T"],
        hidden_BTD: Float[Array, "B T D"],
        step: StepInputs,
        cache: Caches,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """Predict the hidden states of the next entries; also returns the cache, of the kind given, with these entries in it."""
        raise NotImplementedError

    def logits(self, target: Llama, hidden_BTD: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        """Logits of output hidden states over the draft vocabulary; on a mesh, over this rank's part of it."""
        raise NotImplementedError

    def target_tokens(self, draft_BT: Int32[Array, "*B"]) -> Int32[Array, "*B"]:
        """Map ids of the draft vocabulary to the target's token ids."""
        return draft_BT

    def _embedding(self, target: Llama, token_BT: Array) -> Array:
        with jax.named_scope("embed"):
            x_BTD = embed(self.embed[...], token_BT, self.vocab_ranks) if self.config.own_embedding else target.embedding(token_BT)
            return x_BTD.astype(self.fuse.dtype)  # in training the drafter is float32, whatever the target's dtype is


class Eagle1(Drafter):
    """Joins embedding and hidden state, then predicts the target's next final state with decoder layers."""

    config: Eagle1Config

    def __init__(self, config: Eagle1Config, mesh: MeshSpec = ONE_DEVICE) -> None:
        super().__init__(config, mesh)
        decoder = config.decoder
        D = decoder.hidden_size
        self.fuse = declare(WeightSpec((D, 2 * D), ("embed", None), fan_in=2 * D))
        if config.fuse_bias:
            self.fuse_bias = declare(WeightSpec((D,), ("embed",), init="zeros"))
        self.layers = nnx.List(
            [DecoderLayer(decoder, i, mesh, attention_normed=i > 0 or config.first_layer_normed) for i in range(decoder.num_layers)]
        )
        if config.final_normed:
            self.norm = RMSNorm(D, decoder.rms_norm_eps)

    def read(self, feature_BTf: Float[Array, "B T f"]) -> Float[Array, "B T D"]:
        """Return the target's final hidden state unchanged."""
        return feature_BTf

    def __call__(
        self,
        target: Llama,
        token_BT: Int32[Array, "B T"],
        hidden_BTD: Float[Array, "B T D"],
        step: StepInputs,
        cache: Caches,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """Run the layers over new entries."""
        joined_BTi = jnp.concatenate([self._embedding(target, token_BT), hidden_BTD], axis=-1)
        x_BTD = matmul(joined_BTi, self.fuse[...])
        if self.config.fuse_bias:
            x_BTD = x_BTD + jnp.broadcast_to(self.fuse_bias[...], x_BTD.shape)
        update_BTD, written = None, []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x_BTD, update_BTD, layer_cache = layer(x_BTD, update_BTD, step, layer_cache)
            written.append(layer_cache)
        if self.config.final_normed:
            return self.norm.add_norm(x_BTD, update_BTD)[1], tuple(written)
        return x_BTD if update_BTD is None else x_BTD + update_BTD, tuple(written)

    def logits(self, target: Llama, hidden_BTD: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        """Logits of the target's own output head."""
        return target.logits(hidden_BTD.astype(target.embed.dtype))


class Eagle3Layer(nnx.Module):
    """A decoder layer whose attention reads embedding and hidden state side by side, each after a norm of its own."""

    def __init__(self, config: Eagle3Config, mesh: MeshSpec) -> None:
        decoder = config.decoder
        D, eps = decoder.hidden_size, decoder.rms_norm_eps
        self.norm_before_residual = config.norm_before_residual
        self.embedding_norm, self.hidden_norm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.attention = Attention(decoder, 0, mesh, input_size=2 * D)
        self.feed_forward_norm = RMSNorm(D, eps)
        self.feed_forward = SwiGLU(D, decoder.intermediate_size, mesh)

    def __call__(
        self,
        embedding_BTD: Float[Array, "B T D"],
        hidden_BTD: Float[Array, "B T D"],
        step: StepInputs,
        cache: LayerCache | TreeCache | PackedCache,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The layer's output, residuals included, and its cache with the new entries in it."""
        normed_BTD = self.hidden_norm(hidden_BTD)
        joined_BTi = jnp.concatenate([self.embedding_norm(embedding_BTD), normed_BTD], axis=-1)
        attended_BTD, cache = self.attention(joined_BTi, step, cache)
        x_BTD, normed_BTD = self.feed_forward_norm.add_norm(normed_BTD if self.norm_before_residual else hidden_BTD, attended_BTD)
        return x_BTD + self.feed_forward(normed_BTD), cache


class Eagle3(Drafter):
    """Joins the residual streams of three of the target's layers, and has its own output head over a vocabulary of frequent tokens."""

    config: Eagle3Config

    def __init__(self, config: Eagle3Config, mesh: MeshSpec = ONE_DEVICE) -> None:
        super().__init__(config, mesh)
        D, eps = config.decoder.hidden_size, config.decoder.rms_norm_eps
        width = config.target_hidden_size
        if config.norm_before_fuse:
            self.fuse_norm = RMSNorm(len(config.aux_layers) * width, eps)
        if config.norm_each_aux:
            self.aux_norms = nnx.List([RMSNorm(width, eps) for _ in config.aux_layers])
        joined = len(config.aux_layers) * width
        self.fuse = declare(WeightSpec((D, joined), ("embed", None), fan_in=joined))
        self.layer = Eagle3Layer(config, mesh)
        self.norm = RMSNorm(D, eps)
        self.head = declare(WeightSpec((config.draft_vocab_size, D), ("vocab", "embed"), fan_in=D))
        self.reduced_vocabulary = True
        self.token_ids = declare(WeightSpec((config.draft_vocab_size,), (None,), init="numbers"))

    def read(self, feature_BTf: Float[Array, "B T f"]) -> Float[Array, "B T D"]:
        """Join the three residual streams and project them to the drafter's width."""
        if self.config.norm_before_fuse:
            feature_BTf = self.fuse_norm(feature_BTf)
        if self.config.norm_each_aux:
            parts = jnp.split(feature_BTf, len(self.aux_norms), axis=-1)
            feature_BTf = jnp.concatenate([norm(part) for norm, part in zip(self.aux_norms, parts, strict=True)], axis=-1)
        return matmul(feature_BTf, self.fuse[...])

    def __call__(
        self,
        target: Llama,
        token_BT: Int32[Array, "B T"],
        hidden_BTD: Float[Array, "B T D"],
        step: StepInputs,
        cache: Caches,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """Run the layer over new entries."""
        x_BTD, written = self.layer(self._embedding(target, token_BT), hidden_BTD, step, cache[0])
        return self.norm(x_BTD) if self.config.norm_fed_back else x_BTD, (written,)

    def logits(self, target: Llama, hidden_BTD: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        """Logits of the drafter's own output head, after the final norm."""
        with jax.named_scope("draft_head"):
            normed_BTD = hidden_BTD if self.config.norm_fed_back else self.norm(hidden_BTD)
            return matmul(normed_BTD, self.head[...], dtype=jnp.dtype(jnp.float32))

    def target_tokens(self, draft_BT: Int32[Array, "*B"]) -> Int32[Array, "*B"]:
        """Look the drafter's ids up in its table of the target's token ids."""
        return self.token_ids[...][draft_BT]


def build_drafter(config: DrafterConfig, mesh: MeshSpec = ONE_DEVICE) -> Drafter:
    """Build the module of this configuration's version; its weights are abstract until bound."""
    return Eagle1(config, mesh) if isinstance(config, Eagle1Config) else Eagle3(config, mesh)

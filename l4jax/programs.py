"""The compiled programs: what is traced, what is donated, and which shapes exist.

A program is a pure function of the flat weights, small inputs and a donated state. Every distinct combination of input
shapes and :class:`SamplingFeatures` is compiled once; the buckets below keep those few.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from l4jax.cache import LayerCache, PageTables
from l4jax.config import ModelConfig
from l4jax.decoding.generate import DecodeState, DecodeTokens, decode_tokens
from l4jax.decoding.sampling import Logprobs, SamplingFeatures, SamplingRows, TokenCounts, sample
from l4jax.model.llama import Llama
from l4jax.model.weights import BoundModel

PREFILL_LENGTHS = (32, 128, 512)
"""Lengths that a prefill piece is padded to; longer prompts are prefilled in several pieces."""

Cache = tuple[LayerCache, ...]
Leaves = tuple[Array, ...]


class Programs:
    """The programs of one model, compiled on first use for each set of shapes."""

    def __init__(self, config: ModelConfig) -> None:
        self.model = BoundModel(Llama(config))
        self.prefill = jax.jit(self._prefill, donate_argnames="cache", static_argnames="features")
        self.decode = jax.jit(self._decode, donate_argnames="state", static_argnames="features")
        self.logits = jax.jit(self._logits, donate_argnames="cache")

    def _prefill(
        self,
        leaves: Leaves,
        cache: Cache,
        token_BT: Int32[Array, "B T"],
        start_B: Int32[Array, "B"],
        new_B: Int32[Array, "B"],
        tables: PageTables,
        rows: SamplingRows,
        counts: TokenCounts | None,
        *,
        features: SamplingFeatures,
    ) -> tuple[Cache, Int32[Array, "B"], Logprobs | None]:
        """Put a piece of each row's prompt in the cache; the first token of the output, for rows whose prompt it ends."""
        model: Llama = self.model.bind(leaves)
        x_BTD, cache = model(token_BT, start_B, new_B, cache, tables)
        last_BD = jnp.take_along_axis(x_BTD, jnp.maximum(new_B - 1, 0)[:, None, None], axis=1)[:, 0]
        token_B, logprobs = sample(model.logits(last_BD), rows, counts, jnp.zeros_like(new_B), features)
        return cache, token_B, logprobs

    def _decode(
        self,
        leaves: Leaves,
        state: DecodeState,
        tables: PageTables,
        rows: SamplingRows,
        steps: Int32[Array, ""],
        *,
        features: SamplingFeatures,
    ) -> tuple[DecodeState, DecodeTokens]:
        """Up to ``steps`` tokens for every unfinished row, in one dispatch."""
        return decode_tokens(self.model.bind(leaves), state, tables, rows, steps, features)

    def _logits(
        self,
        leaves: Leaves,
        cache: Cache,
        token_BT: Int32[Array, "B T"],
        start_B: Int32[Array, "B"],
        new_B: Int32[Array, "B"],
        tables: PageTables,
    ) -> tuple[Cache, Float32[Array, "B T V"]]:
        """Next-token logits at every position of a piece."""
        model: Llama = self.model.bind(leaves)
        x_BTD, cache = model(token_BT, start_B, new_B, cache, tables)
        return cache, model.logits(x_BTD)

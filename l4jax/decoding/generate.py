"""The plain decode loop: each step produces one token per row, and a dispatch runs many steps without reading anything back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from l4jax.cache import LayerCache, PageTables
from l4jax.decoding.entries import DraftState, Entries
from l4jax.decoding.sampling import NOT_FINITE, Logprobs, SamplingRows, TokenCounts, empty_logprobs, sample, token_logprobs
from l4jax.model.llama import Llama
from sharding.ranks import Ranks, local_index

BURST = 32
"""The most steps, or rounds of speculation, of one dispatch."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What one decode step passes to the next. ``token_B``, each row's last token, has been emitted but is not in the cache yet.

    ``length_B``: tokens in the cache. ``produced_B``: tokens emitted so far. ``counts``: those of all slots, not only of these rows'.
    ``draft``: None without a drafter.
    """

    cache: tuple[LayerCache, ...]
    token_B: Int32[Array, "B"]
    length_B: Int32[Array, "B"]
    produced_B: Int32[Array, "B"]
    done_B: Bool[Array, "B"]
    counts: TokenCounts
    draft: DraftState | None

    def active(self, limit_B: Int32[Array, "B"]) -> Bool[Array, "B"]:
        """The rows that are neither done nor at their limit: no token is run at position ``limit_B[b]`` or later."""
        return ~self.done_B & (self.length_B < limit_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeTokens:
    """What one dispatch produced: each row's tokens from step 0 on, and -1 after them. Log-probabilities after them are undefined.

    ``done_B`` does not include rows that have only reached their limit.
    """

    token_sB: Int32[Array, "s B"]
    logprobs: Logprobs
    steps: Int32[Array, ""]
    done_B: Bool[Array, "B"]


def is_final(token_B: Int32[Array, "B"], produced_B: Int32[Array, "B"], rows: SamplingRows) -> Bool[Array, "B"]:
    """Whether this token, the ``produced_B``-th of its row, is the row's last; NOT_FINITE always is."""
    return (token_B == NOT_FINITE) | jnp.any(token_B[:, None] == rows.stop_Bj, axis=-1) | (produced_B >= rows.max_tokens_B)


def count_token(
    counts: TokenCounts, token_B: Int32[Array, "B"], active_B: Bool[Array, "B"], rows: SamplingRows, vocab_ranks: Ranks
) -> TokenCounts:
    """The counts with one more output token in the active rows' slots."""
    index_B = local_index(token_B, counts.output_UV.shape[1], vocab_ranks)
    return dataclasses.replace(counts, output_UV=counts.output_UV.at[rows.slot_B, index_B].add(active_B.astype(jnp.int32), mode="drop"))


def decode_tokens(
    model: Llama,
    state: DecodeState,
    tables: PageTables,
    rows: SamplingRows,
    limit_B: Int32[Array, "B"],
    steps: Int32[Array, ""],
    entries: Entries | None = None,
) -> tuple[DecodeState, DecodeTokens]:
    """Take ``steps`` steps (at most BURST), fewer if before that every row is done or at its limit.

    With ``entries`` each step also makes the drafter's entry of the token that it runs. On a mesh each rank along ``data`` has its own
    rows; all ranks take as many steps as the longest row needs.
    """
    data, vocab_ranks = model.mesh.along("data"), model.mesh.along("tensor")

    def unfinished(carry: tuple[DecodeState, DecodeTokens]) -> Array:
        state, out = carry
        return (out.steps < jnp.minimum(steps, BURST)) & data.any(jnp.any(state.active(limit_B)))

    def step(carry: tuple[DecodeState, DecodeTokens]) -> tuple[DecodeState, DecodeTokens]:
        state, out = carry
        active_B = state.active(limit_B)
        new_B = active_B.astype(jnp.int32)
        x_BTD, feature_BTf, cache = model(state.token_B[:, None], state.length_B, new_B, state.cache, tables)
        logits_BV = model.logits(x_BTD[:, 0])
        token_B = sample(logits_BV, rows, state.counts, state.produced_B, vocab_ranks)
        # Ranks that do the same work may round differently, and each would choose its own token.
        token_B = model.ranks.from_first(token_B)
        token_B = jnp.where(active_B, token_B, state.token_B)
        produced_B = state.produced_B + new_B

        def record(buffer: Array, value: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(buffer, value, out.steps, 0)

        out = DecodeTokens(
            token_sB=record(out.token_sB, jnp.where(active_B, token_B, -1)),
            logprobs=jax.tree.map(record, out.logprobs, token_logprobs(logits_BV, token_B, jnp.any(rows.reported_B), vocab_ranks)),
            steps=out.steps + 1,
            done_B=state.done_B | is_final(token_B, produced_B, rows),
        )
        counts = count_token(state.counts, token_B, active_B, rows, vocab_ranks)
        draft = state.draft
        if entries is not None:
            assert draft is not None
            added = entries.add(draft.cache, state.token_B[:, None], token_B, feature_BTf, state.length_B, new_B)
            draft = DraftState(added.cache, jnp.where(active_B[:, None], added.hidden_BD, draft.hidden_BD))
        return DecodeState(cache, token_B, state.length_B + new_B, produced_B, out.done_B, counts, draft), out

    B = len(state.token_B)
    logprobs = empty_logprobs((BURST, B), model.config.vocab_size)
    nothing = DecodeTokens(jnp.full((BURST, B), -1, jnp.int32), logprobs, jnp.int32(0), state.done_B)
    return jax.lax.while_loop(unfinished, step, (state, nothing))

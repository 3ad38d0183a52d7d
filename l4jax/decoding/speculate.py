"""Speculative decoding: draft a tree, run the model on all of it in one pass, emit the accepted tokens; many rounds per dispatch.

``decoding.verify`` says why the tokens are those of decoding without speculation. Each row accepts at its own pace.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from l4jax.cache import PageTables, is_local
from l4jax.config import ModelConfig
from l4jax.decoding.draft import Drafting, grow, target_distribution
from l4jax.decoding.entries import DraftState, Entries
from l4jax.decoding.generate import BURST, DecodeState, DecodeTokens, is_final
from l4jax.decoding.plan import Speculation
from l4jax.decoding.sampling import SamplingRows, empty_logprobs
from l4jax.decoding.tree import NONE, StaticTree
from l4jax.decoding.verify import Verified, point_mass, rejection, verify
from l4jax.model.drafter import Drafter

BeyondTraining = Literal["window", "stop"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundCounts:
    """Each row's rounds and drafted tokens since the dispatch began, and how many rounds accepted a draft of each depth.

    ``accepted_Bd[b, i]``: rounds in which the draft at depth i + 1 was accepted, even if the row ended before it.
    """

    rounds_B: Int32[Array, "B"]
    drafted_B: Int32[Array, "B"]
    accepted_Bd: Int32[Array, "B d"]


def room(config: ModelConfig, drafter: Drafter, length_B: Int32[Array, "B"], depth: int, beyond: BeyondTraining) -> Int32[Array, "B"]:
    """The number of levels, at most ``depth``, that a tree may have below a root at position ``length_B``.

    In models with chunk-local layers the tree must end with the root's attention chunk (arXiv 2508.08192, on iRoPE). With ``beyond``
    "stop" it also ends at the length that the drafter was trained on.
    """
    room_B = jnp.full_like(length_B, depth)
    for decoder in (config, drafter.config.decoder):
        if decoder.attention_chunk_size is not None and any(is_local(decoder, i) for i in range(decoder.num_layers)):
            room_B = jnp.minimum(room_B, decoder.attention_chunk_size - 1 - length_B % decoder.attention_chunk_size)
    if beyond == "stop":
        # The node at depth d is at the drafter's position length + d - 1; the deepest is never run.
        room_B = jnp.minimum(room_B, drafter.config.decoder.max_position_embeddings + 1 - length_B)
    return jnp.maximum(room_B, 0)


def window(drafter: Drafter, beyond: BeyondTraining) -> int | None:
    """How many tokens the drafter looks back; None if it sees all."""
    return drafter.config.decoder.max_position_embeddings if beyond == "window" else None


def speculate_tokens(
    entries: Entries,
    state: DecodeState,
    tables: PageTables,
    rows: SamplingRows,
    limit_B: Int32[Array, "B"],
    rounds: Int32[Array, ""],
    plan: Speculation,
    beyond: BeyondTraining,
) -> tuple[DecodeState, DecodeTokens, RoundCounts]:
    """Run ``rounds`` rounds (at most BURST), fewer if before that every row is done or at its limit.

    A round gives each other row one token and those of the accepted drafts. The tokens have the layout of :func:`decode_tokens`.
    """
    model, drafter = entries.target, entries.drafter
    data, vocab_ranks = model.mesh.along("data"), model.mesh.along("tensor")
    B, L = len(state.token_B), plan.tree.depth + 1
    row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
    width = BURST * L

    def unfinished(carry: tuple[DecodeState, DecodeTokens, RoundCounts, Array, Array]) -> Array:
        state, _, _, _, round_number = carry
        return (round_number < jnp.minimum(rounds, BURST)) & data.any(jnp.any(state.active(limit_B)))

    def one_round(
        carry: tuple[DecodeState, DecodeTokens, RoundCounts, Array, Array],
    ) -> tuple[DecodeState, DecodeTokens, RoundCounts, Array, Array]:
        now, out, counted, emitted_B, round_number = carry
        assert now.draft is not None
        active_B = now.active(limit_B)
        drafting = Drafting(drafter, model, now.draft, now.length_B, entries.tables, entries.window)
        # The deepest node is the last token that may be run.
        room_B = jnp.minimum(room(model.config, drafter, now.length_B, plan.tree.depth, beyond), limit_B - now.length_B - 1)
        drawing = rows if plan.sampled else None
        draft, drawn_from = grow(drafting, plan.tree, now.token_B, room_B, active_B, drawing, now.produced_B)
        with jax.named_scope("verify"):
            x_BND, feature_BNf, nodes = model.tree(
                draft.token_BN, now.length_B, draft.tree.depth_BN, draft.valid_BN, draft.tree.sees_BNN, now.cache, tables
            )
            logits_BNV = model.logits(x_BND)
            rule = point_mass(rows, vocab_ranks)
            if drawn_from is not None:
                assert isinstance(plan.tree, StaticTree)
                tree, V = plan.tree, logits_BNV.shape[2]
                rule = rejection(rows, lambda node_B: target_distribution(drafting, drawn_from, tree, node_B, V), vocab_ranks)
            verified = verify(
                logits_BNV,
                draft,
                rule,
                plan.tree.depth,
                now.counts,
                rows,
                now.produced_B,
                active_B,
                vocab_ranks=vocab_ranks,
                repeating=model.ranks,
            )
        kept_B, done_B = _until_final(verified, now.produced_B, rows, active_B)
        last_B1 = jnp.maximum(kept_B - 1, 0)[:, None]
        token_B = jnp.where(active_B, jnp.take_along_axis(verified.token_BL, last_B1, axis=1)[:, 0], now.token_B)

        # The cache gets the keys of the root and of every emitted token but the last, which has not been run.
        cache = model.accept(nodes, verified.node_BL, now.length_B, kept_B, tables)
        # The drafter runs over the same tokens with the target's hidden states, which replace its own guesses of them.
        feature_BLf = jnp.take_along_axis(feature_BNf, verified.node_BL[:, :, None], axis=1)
        passed_BL = jnp.concatenate([now.token_B[:, None], verified.token_BL[:, :-1]], axis=1)
        added = entries.add(now.draft.cache, passed_BL, token_B, feature_BLf, now.length_B, kept_B)
        draft_state = DraftState(added.cache, jnp.where(active_B[:, None], added.hidden_BD, now.draft.hidden_BD))

        emitted_BL = jnp.arange(L, dtype=jnp.int32)[None, :] < kept_B[:, None]
        place_BL = jnp.where(emitted_BL, emitted_B[:, None] + jnp.arange(L, dtype=jnp.int32)[None, :], width)

        def record(buffer: Array, value_BL: Array) -> Array:
            return buffer.at[place_BL, row_B1].set(value_BL, mode="drop")

        emitted_B = emitted_B + kept_B
        out = DecodeTokens(
            token_sB=record(out.token_sB, verified.token_BL),
            logprobs=jax.tree.map(record, out.logprobs, verified.logprobs),
            steps=jnp.max(emitted_B),
            done_B=now.done_B | done_B,
        )
        reached_Bd = jnp.arange(1, L, dtype=jnp.int32)[None, :] <= verified.accepted_B[:, None]
        counted = RoundCounts(
            rounds_B=counted.rounds_B + active_B.astype(jnp.int32),
            drafted_B=counted.drafted_B + jnp.sum(draft.valid_BN[:, 1:], axis=1, dtype=jnp.int32),
            accepted_Bd=counted.accepted_Bd + (reached_Bd & active_B[:, None]).astype(jnp.int32),
        )
        state = DecodeState(cache, token_B, now.length_B + kept_B, now.produced_B + kept_B, out.done_B, verified.counts, draft_state)
        return state, out, counted, emitted_B, round_number + 1

    logprobs = empty_logprobs((width, B), model.config.vocab_size)
    nothing = DecodeTokens(jnp.full((width, B), NONE, jnp.int32), logprobs, jnp.int32(0), state.done_B)
    zeros_B = jnp.zeros(B, jnp.int32)
    start = (state, nothing, RoundCounts(zeros_B, zeros_B, jnp.zeros((B, L - 1), jnp.int32)), zeros_B, jnp.int32(0))
    state, out, counted, _, _ = jax.lax.while_loop(unfinished, one_round, start)
    return state, dataclasses.replace(out, steps=data.max(out.steps)), counted


def _until_final(verified: Verified, produced_B: Array, rows: SamplingRows, active_B: Array) -> tuple[Array, Array]:
    """How many of a round's tokens are emitted, up to the first that ends its row; and which rows end."""
    L = verified.token_BL.shape[1]
    index_1L = jnp.arange(L, dtype=jnp.int32)[None, :]
    emitted_BL = (index_1L <= verified.accepted_B[:, None]) & active_B[:, None]
    of_each = jax.vmap(is_final, in_axes=(1, 1, None), out_axes=1)
    final_BL = emitted_BL & of_each(verified.token_BL, produced_B[:, None] + 1 + index_1L, rows)
    done_B = jnp.any(final_BL, axis=1)
    kept_B = jnp.where(done_B, jnp.argmax(final_BL, axis=1).astype(jnp.int32) + 1, verified.accepted_B + 1)
    return jnp.where(active_B, kept_B, 0), done_B

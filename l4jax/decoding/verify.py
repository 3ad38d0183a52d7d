"""Verification: which drafted tokens are accepted, and which token follows them, by rules that keep the model's distribution.

:func:`point_mass` draws each token as decoding without speculation would, and accepts a draft if it is the token drawn. This is right for
any tree, however it was drafted. The noise of a draw is keyed by (seed, output position, token), so the tokens are the same as without
speculation. At temperature 0 this is greedy verification. (EAGLE-2's code accepts x with probability p(x), else removes x from p and
tries the next; that gives the same distribution.)

:func:`rejection` is multi-round rejection (arXiv 2402.14160, algorithm 2), for children drawn one after the other, without replacement,
from the drafter's distribution. It accepts more of them at temperatures above 0. Its tokens have the same distribution as without
speculation, but are other tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from l4jax.decoding.generate import count_token
from l4jax.decoding.randomness import Purpose, stream_keys, uniform
from l4jax.decoding.sampling import (
    NOT_FINITE,
    Logprobs,
    SamplingRows,
    TokenCounts,
    draw,
    empty_logprobs,
    probabilities,
    sample,
    token_logprobs,
)
from l4jax.decoding.tree import NONE, TreeTables
from sharding.ranks import ONE, Ranks, local_index


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """Drafted trees: each node's token, and the tables. Nodes that are not ``valid_BN`` are never accepted, nor is any node below them."""

    token_BN: Int32[Array, "B N"]
    tree: TreeTables
    valid_BN: Bool[Array, "B N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verified:
    """A round's result: ``token_BL``, the tokens of the ``accepted_B`` accepted nodes and the token after them, then NONE.

    ``node_BL``: the root and the accepted nodes, then zeros. ``counts`` includes all of these tokens.
    """

    token_BL: Int32[Array, "B L"]
    node_BL: Int32[Array, "B L"]
    accepted_B: Int32[Array, "B"]
    counts: TokenCounts
    logprobs: Logprobs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NodeState:
    """The node of each row being verified, the model's logits there, and the counts with the tokens on the path to it.

    ``position_B``: the output position of the token after the node.
    """

    node_B: Int32[Array, "B"]
    logits_BV: Float32[Array, "B V"]
    counts: TokenCounts
    position_B: Int32[Array, "B"]


Rule = Callable[[NodeState, Draft], tuple[Int32[Array, "B"], Int32[Array, "B"]]]
"""Chooses the token after a node. Returns it, and the child that holds it, NONE if no child is accepted."""


def verify(
    logits_BNV: Float32[Array, "B N V"],
    draft: Draft,
    rule: Rule,
    depth: int,
    counts: TokenCounts,
    rows: SamplingRows,
    position_B: Int32[Array, "B"],
    active_B: Bool[Array, "B"],
    *,
    vocab_ranks: Ranks = ONE,
    repeating: Ranks = ONE,
) -> Verified:
    """Walk down each row's tree, of at most this depth, given the model's logits at its nodes.

    ``position_B``: the output position of the token after the root. Rows that are not active emit nothing. ``repeating``: ranks that do
    the same work, which all follow the first one's decisions.
    """
    B, _, V = logits_BNV.shape
    L = depth + 1

    def put(buffer: Array, value: Array, level: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(buffer, value, level, 0)

    def descending(carry: tuple[Array, Array, Array, Verified]) -> Array:
        level, _, alive_B, _ = carry
        return (level < L) & jnp.any(alive_B)

    def descend(carry: tuple[Array, Array, Array, Verified]) -> tuple[Array, Array, Array, Verified]:
        level, node_B, alive_B, out = carry
        logits_BV = jnp.take_along_axis(logits_BNV, node_B[:, None, None], axis=1)[:, 0]
        token_B, child_B = repeating.from_first(jnp.stack(rule(NodeState(node_B, logits_BV, out.counts, position_B + level), draft)))
        accepts_B = alive_B & (child_B != NONE)
        of_token = token_logprobs(logits_BV, token_B, jnp.any(rows.reported_B), vocab_ranks)
        out = Verified(
            token_BL=put(out.token_BL, jnp.where(alive_B, token_B, NONE), level),
            node_BL=put(out.node_BL, jnp.where(alive_B, node_B, 0), level),
            accepted_B=out.accepted_B + accepts_B.astype(jnp.int32),
            counts=count_token(out.counts, token_B, alive_B, rows, vocab_ranks),
            logprobs=jax.tree.map(lambda buffer, value: put(buffer, value, level), out.logprobs, of_token),
        )
        return level + 1, jnp.where(accepts_B, child_B, node_B), accepts_B, out

    nothing = Verified(
        token_BL=jnp.full((L, B), NONE, jnp.int32),
        node_BL=jnp.zeros((L, B), jnp.int32),
        accepted_B=jnp.zeros(B, jnp.int32),
        counts=counts,
        logprobs=empty_logprobs((L, B), V * vocab_ranks.count),
    )
    start = (jnp.int32(0), jnp.zeros(B, jnp.int32), active_B, nothing)
    out = jax.lax.while_loop(descending, descend, start)[3]
    by_row = jax.tree.map(lambda buffer: jnp.swapaxes(buffer, 0, 1), (out.token_BL, out.node_BL, out.logprobs))
    return Verified(by_row[0], by_row[1], out.accepted_B, out.counts, by_row[2])


def point_mass(rows: SamplingRows, vocab_ranks: Ranks = ONE) -> Rule:
    """Accept the child that is the token decoding without speculation would draw; for trees drafted in any way."""

    def rule(at: NodeState, draft: Draft) -> tuple[Array, Array]:
        token_B = sample(at.logits_BV, rows, at.counts, at.position_B, vocab_ranks)
        is_it_BN = (draft.tree.parent_BN == at.node_B[:, None]) & (draft.token_BN == token_B[:, None]) & draft.valid_BN
        child_B = jnp.argmax(is_it_BN, axis=1).astype(jnp.int32)
        return token_B, jnp.where(jnp.any(is_it_BN, axis=1), child_B, NONE)

    return rule


DraftDistribution = Callable[[Int32[Array, "B"]], Float32[Array, "B V"]]
"""Returns the log-probabilities, over this rank's part of the target's vocabulary, that a node's children were drawn from."""


def rejection(rows: SamplingRows, drafted: DraftDistribution, vocab_ranks: Ranks = ONE) -> Rule:
    """Multi-round rejection; a node's children must have been drawn from ``drafted`` without replacement, in the tree's order.

    The first child x is accepted with probability min(1, p(x) / q(x)). Otherwise p becomes the normalised residual max(p - q, 0), x is
    removed from q, and the next child is tried. After the last child the token is drawn from p. So each q is the distribution that the
    child was drawn from, given the siblings before it. q is kept as logarithms: at low temperatures everything that remains without x may
    be smaller than any float32.
    """

    def rule(at: NodeState, draft: Draft) -> tuple[Array, Array]:
        p_BV, finite_B = probabilities(at.logits_BV, rows, at.counts, at.position_B, vocab_ranks)
        V = p_BV.shape[1]

        def of_token(values_BV: Array, token_B: Array) -> Array:
            index_B = local_index(token_B, V, vocab_ranks)
            value_B = jnp.take_along_axis(values_BV, jnp.minimum(index_B, V - 1)[:, None], axis=1)[:, 0]
            return vocab_ranks.sum(jnp.where(index_B < V, value_B, 0.0))

        def existing(child_B: Array) -> Array:
            valid_B = jnp.take_along_axis(draft.valid_BN, jnp.maximum(child_B, 0)[:, None], axis=1)[:, 0]
            return jnp.where((child_B != NONE) & valid_B, child_B, NONE)

        def trying(carry: tuple[Array, Array, Array, Array, Array]) -> Array:
            child_B, accepted_B, *_ = carry
            return jnp.any((child_B != NONE) & (accepted_B == NONE))

        def attempt(carry: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
            child_B, accepted_B, tried, p_BV, log_q_BV = carry
            open_B = (child_B != NONE) & (accepted_B == NONE)
            token_B = jnp.take_along_axis(draft.token_BN, jnp.maximum(child_B, 0)[:, None], axis=1)[:, 0]
            chance_B = uniform(stream_keys(rows.seed_B2, at.position_B, Purpose.ACCEPTANCE, tried))
            q_BV = jnp.exp(log_q_BV)
            accepts_B = open_B & (chance_B * of_token(q_BV, token_B) < of_token(p_BV, token_B))
            rejected_B = open_B & ~accepts_B
            left_BV = _normalized(jnp.maximum(p_BV - q_BV, 0.0), p_BV, vocab_ranks)
            following_B = jnp.take_along_axis(draft.tree.next_sibling_BN, jnp.maximum(child_B, 0)[:, None], axis=1)[:, 0]
            return (
                jnp.where(rejected_B, existing(following_B), child_B),
                jnp.where(accepts_B, child_B, accepted_B),
                tried + 1,
                jnp.where(rejected_B[:, None], left_BV, p_BV),
                jnp.where(rejected_B[:, None], without(log_q_BV, token_B, vocab_ranks), log_q_BV),
            )

        first_B = existing(jnp.take_along_axis(draft.tree.first_child_BN, at.node_B[:, None], axis=1)[:, 0])
        start = (first_B, jnp.full_like(first_B, NONE), jnp.int32(0), p_BV, drafted(at.node_B))
        _, accepted_B, _, p_BV, _ = jax.lax.while_loop(trying, attempt, start)
        token_B = jnp.take_along_axis(draft.token_BN, jnp.maximum(accepted_B, 0)[:, None], axis=1)[:, 0]
        token_B = jnp.where(accepted_B != NONE, token_B, draw(jnp.log(p_BV), rows, at.position_B, Purpose.RESIDUAL, vocab_ranks))
        return jnp.where(finite_B, token_B, NOT_FINITE), jnp.where(finite_B, accepted_B, NONE)

    return rule


def without(log_q_BV: Float32[Array, "B V"], token_B: Int32[Array, "B"], vocab_ranks: Ranks = ONE) -> Float32[Array, "B V"]:
    """Log-probabilities of the next draw once these tokens are drawn without replacement; all -inf where no token remains."""
    row_B = jnp.arange(len(token_B), dtype=jnp.int32)
    left_BV = log_q_BV.at[row_B, local_index(token_B, log_q_BV.shape[1], vocab_ranks)].set(-jnp.inf, mode="drop")
    highest_B1 = vocab_ranks.max(jnp.max(left_BV, axis=-1))[:, None]
    highest_B1 = jnp.where(jnp.isneginf(highest_B1), 0.0, highest_B1)
    total_B1 = vocab_ranks.sum(jnp.sum(jnp.exp(left_BV - highest_B1), axis=-1))[:, None]
    return left_BV - highest_B1 - jnp.where(total_B1 > 0, jnp.log(total_B1), 0.0)


def _normalized(weights_BV: Array, otherwise_BV: Array, vocab_ranks: Ranks) -> Array:
    """Weights as probabilities; ``otherwise_BV`` where rounding left no weight."""
    total_B1 = vocab_ranks.sum(jnp.sum(weights_BV, axis=-1))[:, None]
    return jnp.where(total_B1 > 0, weights_BV / jnp.where(total_B1 > 0, total_B1, 1.0), otherwise_BV)

"""Drafting: a drafter grows a tree of guesses after each row's last token, one level per pass.

The drafter's cache does not change: the keys of the tree's inner nodes are kept beside it until the round is over.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from l4jax.cache import PageTables, TreeCache
from l4jax.decoding.entries import DraftState
from l4jax.decoding.randomness import Purpose, gumbel, stream_keys
from l4jax.decoding.sampling import SamplingRows, highest_tokens, log_probabilities
from l4jax.decoding.tree import NONE, DynamicTree, StaticTree, TreeTables, tree_tables
from l4jax.decoding.verify import Draft
from l4jax.model.drafter import Drafter
from l4jax.model.llama import Llama
from l4jax.model.steps.tree import tree_step
from sharding.ranks import local_index


@dataclasses.dataclass(frozen=True)
class Drafting:
    """What growing a tree needs. ``window``: how many tokens a query of the drafter looks back; None if it sees all."""

    drafter: Drafter
    target: Llama
    state: DraftState
    length_B: Array
    tables: PageTables
    window: int | None

    def start(self) -> tuple[TreeCache, ...]:
        """The drafter's cache without any nodes."""
        return tuple(TreeCache.around(layer, len(self.length_B)) for layer in self.state.cache)

    def run(
        self, token_Bn: Array, hidden_BnD: Array, depth: int, sees_BnS: Array, cache: tuple[TreeCache, ...]
    ) -> tuple[Array, tuple[TreeCache, ...]]:
        """Run the drafter on nodes of this depth, given their parents' hidden states.

        ``sees_BnS``: which nodes each of these nodes attends to, of all nodes run so far, these included.
        """
        B, n = token_Bn.shape
        # The last entry of the drafter's cache is the root's, so the root's children come next.
        depth_Bn = jnp.full((B, n), depth - 1, jnp.int32)
        decoder, ranks = self.drafter.config.decoder, self.drafter.ranks
        step = tree_step(decoder, self.length_B, depth_Bn, jnp.ones((B, n), bool), sees_BnS, self.tables, ranks, window=self.window)
        return self.drafter(self.target, token_Bn, hidden_BnD, step, cache)

    def logits(self, hidden_BnD: Array) -> Array:
        """Logits over the draft vocabulary."""
        return self.drafter.logits(self.target, hidden_BnD)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftDistributions:
    """Log-probabilities over the draft vocabulary that the children of each inner node of a static tree were drawn from."""

    log_q_BIV: Float32[Array, "B I V"]


def draft_static(
    drafting: Drafting, tree: StaticTree, root_B: Int32[Array, "B"], rows: SamplingRows | None, position_B: Int32[Array, "B"]
) -> tuple[Int32[Array, "B N"], DraftDistributions | None]:
    """Draft the tokens of a static tree: each node's children are the drafter's likeliest tokens after it.

    With ``rows``, children are drawn without replacement from the drafter's distribution at each row's temperature (at 0 they are the
    likeliest), with noise keyed by (seed, output position, node, token); the distributions are returned too. ``position_B`` is the
    output position of the token after the root.
    """
    B, vocab_ranks = len(root_B), drafting.drafter.vocab_ranks
    inner = [node for node in range(tree.size) if tree.children(node)]
    tokens = [root_B[:, None]]
    distributions = []
    cache = drafting.start()
    ran: list[int] = []
    hidden_BnD = drafting.state.hidden_BD[:, None]
    for depth in range(tree.depth):
        parents = [node for node in inner if tree.depths[node] == depth]
        if depth > 0:
            before = [node for node in range(tree.size) if tree.depths[node] == depth - 1 and tree.children(node)]
            level = [node for node in range(tree.size) if tree.depths[node] == depth]
            ran += parents
            from_parent = np.array([before.index(tree.parents[node]) for node in parents])
            token_Bn = tokens[-1][:, np.array([level.index(node) for node in parents])]
            sees = np.array([[_is_above(tree, other, node) for other in ran] for node in parents])
            sees_BnS = jnp.broadcast_to(jnp.asarray(sees)[None], (B, *sees.shape))
            hidden_BnD, cache = drafting.run(token_Bn, hidden_BnD[:, from_parent], depth, sees_BnS, cache)
        logits_BnV = drafting.logits(hidden_BnD)
        if rows is not None:
            log_q_BnV, logits_BnV = _perturbed(logits_BnV, rows, position_B + depth, parents, drafting)
            distributions.append(log_q_BnV)
        most = max(len(tree.children(node)) for node in parents)
        _, top_id = highest_tokens(logits_BnV.reshape(-1, logits_BnV.shape[-1]), most, vocab_ranks)
        children = [(parents.index(parent), tree.children(parent).index(child)) for parent in parents for child in tree.children(parent)]
        parent_index, rank_index = (np.array(index) for index in zip(*children, strict=True))
        tokens.append(drafting.drafter.target_tokens(top_id.reshape(B, len(parents), most)[:, parent_index, rank_index]))
    drawn_from = DraftDistributions(jnp.concatenate(distributions, axis=1)) if distributions else None
    return jnp.concatenate(tokens, axis=1), drawn_from


def _is_above(tree: StaticTree, other: int, node: int) -> bool:
    while node > other:
        node = tree.parents[node]
    return node == other


def _perturbed(logits_BnV: Array, rows: SamplingRows, position_B: Array, nodes: list[int], drafting: Drafting) -> tuple[Array, Array]:
    """Log-probabilities, and their sums with Gumbel noise: the highest sums, in order, are draws without replacement (Gumbel-top-k)."""
    vocab_ranks = drafting.drafter.vocab_ranks
    V = logits_BnV.shape[-1]
    temperature_B = jnp.where(rows.temperature_B > 0, rows.temperature_B, 1.0)
    scaled_BnV = logits_BnV / temperature_B[:, None, None]
    log_BnV = log_probabilities(scaled_BnV.reshape(-1, V), vocab_ranks).reshape(scaled_BnV.shape)

    def noise(node: Array) -> Array:
        return gumbel(stream_keys(rows.seed_B2, position_B, Purpose.DRAFT, node), token_V)

    token_V = vocab_ranks.index() * V + jnp.arange(V, dtype=jnp.int32)
    noise_BnV = jax.vmap(noise, out_axes=1)(jnp.asarray(nodes, jnp.int32))
    # At temperature 0 the likeliest tokens are the best guesses, and their acceptance does not depend on how they were drawn.
    return log_BnV, log_BnV + jnp.where(rows.temperature_B[:, None, None] > 0, noise_BnV, 0.0)


def target_distribution(
    drafting: Drafting, drawn_from: DraftDistributions, tree: StaticTree, node_B: Int32[Array, "B"], V: int
) -> Float32[Array, "B V"]:
    """Log-probabilities that the children of these nodes were drawn from, over this rank's ``V`` tokens of the target's vocabulary.

    All are -inf for a leaf.
    """
    inner = [node for node in range(tree.size) if tree.children(node)]
    index_of = np.full(tree.size, len(inner), np.int32)
    index_of[inner] = np.arange(len(inner))
    vocab_ranks, row_B = drafting.drafter.vocab_ranks, jnp.arange(len(node_B), dtype=jnp.int32)
    log_q_BV = drawn_from.log_q_BIV.at[row_B, jnp.asarray(index_of)[node_B]].get(mode="fill", fill_value=-jnp.inf)
    if not drafting.drafter.reduced_vocabulary:
        return log_q_BV
    log_q_BV = vocab_ranks.concatenate(log_q_BV, axis=1)
    token_V = drafting.drafter.target_tokens(jnp.arange(log_q_BV.shape[1], dtype=jnp.int32))
    nothing_BV = jnp.full((len(node_B), V), -jnp.inf, jnp.float32)
    return nothing_BV.at[:, local_index(token_V, V, vocab_ranks)].set(log_q_BV, mode="drop")


def draft_dynamic(drafting: Drafting, tree: DynamicTree, root_B: Int32[Array, "B"]) -> tuple[Int32[Array, "B N"], Int32[Array, "B N"]]:
    """Tokens and parents of dynamic trees (EAGLE-2, arXiv 2406.16858, section 4): expanded, then reranked.

    A node's score is the drafter's log-probability of the path to it. Ties go to the older node; a parent is always older, so no child is
    kept without its parent.
    """
    B, k = len(root_B), tree.topk
    log_BV = log_probabilities(drafting.logits(drafting.state.hidden_BD), drafting.drafter.vocab_ranks)
    score_Bk, id_Bk = highest_tokens(log_BV, k, drafting.drafter.vocab_ranks)
    token_Bk = drafting.drafter.target_tokens(id_Bk)
    pool_token, pool_score, pool_parent = [token_Bk], [score_Bk], [jnp.full((B, k), NONE, jnp.int32)]
    # The frontier is the nodes to expand next. For each we keep its index in the pool, and which earlier nodes it attends to.
    frontier_Bk = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32)[None], (B, k))
    hidden_BkD = jnp.broadcast_to(drafting.state.hidden_BD[:, None], (B, k, drafting.state.hidden_BD.shape[1]))
    above_BkS = jnp.zeros((B, k, 0), bool)
    itself_BkS = jnp.broadcast_to(jnp.eye(k, dtype=bool)[None], (B, k, k))
    cache = drafting.start()
    pooled = k
    for depth in range(1, tree.steps):
        sees_BkS = jnp.concatenate([above_BkS, itself_BkS], axis=2)
        hidden_BkD, cache = drafting.run(token_Bk, hidden_BkD, depth, sees_BkS, cache)
        log_MV = log_probabilities(drafting.logits(hidden_BkD).reshape(B * k, -1), drafting.drafter.vocab_ranks)
        log_Mk, id_Mk = highest_tokens(log_MV, k, drafting.drafter.vocab_ranks)
        child_score_Bc = (score_Bk[:, :, None] + log_Mk.reshape(B, k, k)).reshape(B, k * k)
        child_token_Bc = drafting.drafter.target_tokens(id_Mk).reshape(B, k * k)
        pool_token.append(child_token_Bc)
        pool_score.append(child_score_Bc)
        pool_parent.append(jnp.repeat(frontier_Bk, k, axis=1))
        score_Bk, chosen_Bk = jax.lax.top_k(child_score_Bc, k)
        from_Bk = chosen_Bk.astype(jnp.int32) // k
        token_Bk = jnp.take_along_axis(child_token_Bc, chosen_Bk, axis=1)
        frontier_Bk = pooled + chosen_Bk.astype(jnp.int32)
        hidden_BkD = jnp.take_along_axis(hidden_BkD, from_Bk[:, :, None], axis=1)
        above_BkS = jnp.take_along_axis(sees_BkS, from_Bk[:, :, None], axis=1)
        pooled += k * k
    token_BX, score_BX, parent_BX = (jnp.concatenate(part, axis=1) for part in (pool_token, pool_score, pool_parent))
    return _rerank(token_BX, score_BX, parent_BX, root_B, tree.nodes)


def _rerank(token_BX: Array, score_BX: Array, parent_BX: Array, root_B: Array, nodes: int) -> tuple[Array, Array]:
    """The root and the best ``nodes`` - 1 nodes of the pool, in the order in which they were grown."""
    B, X = token_BX.shape
    _, best_Bm = jax.lax.top_k(score_BX, nodes - 1)
    kept_Bm = jnp.sort(best_Bm.astype(jnp.int32), axis=1)
    row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
    number_BX = jnp.zeros((B, X), jnp.int32).at[row_B1, kept_Bm].set(jnp.arange(1, nodes, dtype=jnp.int32)[None])
    parent_Bm = jnp.take_along_axis(parent_BX, kept_Bm, axis=1)
    parent_Bm = jnp.where(parent_Bm == NONE, 0, jnp.take_along_axis(number_BX, jnp.maximum(parent_Bm, 0), axis=1))
    token_BN = jnp.concatenate([root_B[:, None], jnp.take_along_axis(token_BX, kept_Bm, axis=1)], axis=1)
    return token_BN, jnp.concatenate([jnp.full((B, 1), NONE, jnp.int32), parent_Bm], axis=1)


def grow(
    drafting: Drafting,
    shape: StaticTree | DynamicTree,
    root_B: Int32[Array, "B"],
    room_B: Int32[Array, "B"],
    active_B: Bool[Array, "B"],
    rows: SamplingRows | None,
    position_B: Int32[Array, "B"],
) -> tuple[Draft, DraftDistributions | None]:
    """Grow a tree of this shape after each row's root; nodes deeper than ``room_B`` levels are not valid.

    ``rows`` and ``position_B`` are as in :func:`draft_static`.
    """
    drawn_from = None
    with jax.named_scope("draft"):
        if isinstance(shape, StaticTree):
            token_BN, drawn_from = draft_static(drafting, shape, root_B, rows, position_B)
            parent_BN = jnp.broadcast_to(jnp.asarray(shape.parents, jnp.int32)[None], token_BN.shape)
        else:
            assert rows is None, "reranking changes the order in which a node's children were drawn"
            token_BN, parent_BN = draft_dynamic(drafting, shape, root_B)
        # Ranks that do the same work may round differently, and the target would attend to a different tree on each.
        token_BN, parent_BN = drafting.drafter.ranks.from_first(jnp.stack([token_BN, parent_BN]))
        tree: TreeTables = tree_tables(parent_BN, shape.depth)
        return Draft(token_BN, tree, (tree.depth_BN <= room_B[:, None]) & active_B[:, None]), drawn_from

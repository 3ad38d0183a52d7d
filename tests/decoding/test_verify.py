"""The rules of verification by exact enumeration: the emitted tokens have the target's distribution, whatever was drafted.

Nothing is sampled. The test supplies the numbers that accept or reject, and finds by bisection on the verifier itself where a decision
changes; and it reads the weights that the last token is drawn from. So probabilities are exact to float32, for every order in which
children may have been drawn.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import SamplingParams
from l4jax.decoding import sampling, verify
from l4jax.decoding.sampling import TokenCounts
from l4jax.decoding.tree import NONE, StaticTree, tree_tables
from sharding.ranks import ONE
from tests.decoding.rows import sampling_rows

V = 5
PLAIN = SamplingParams(temperature=1.0)
NO_COUNTS = TokenCounts(np.zeros((2, V), bool), np.zeros((2, V), np.int32))
ABOVE = 3
"""The token above a node that is below the root's child."""
BISECTIONS = 26
SCALE = 2**30


def distributions(count, seed, *, sharpness=2.0):
    """Random ones, some with tokens that cannot come."""
    rng = np.random.default_rng(seed)
    weights = np.exp(sharpness * rng.normal(size=(count, V)))
    weights[: count // 3, 1] = 0.0
    return weights / weights.sum(1, keepdims=True)


class Node:
    """A node of each row with children, and a verifier whose chances the test decides: ``outcome(attempts [R, k], final)``."""

    def __init__(self, p, q, tokens, monkeypatch, *, valid=None, above=None, params=PLAIN, counted=None):
        """``p``, ``q`` [R, V] (without ``q``, the rule is ``point_mass``), ``tokens`` [R, k].

        Without ``above`` the node is the root. With ``above`` [R] it is the root's first child, which holds that token and is accepted.
        ``counted`` [V]: how often each token is in the output up to the root, for the penalties of ``params``.
        """
        R, k = tokens.shape
        paths = [[i] for i in range(k)] if above is None else [[0], *([0, i] for i in range(k))]
        tree = StaticTree.from_paths(paths)
        self.tokens = tokens
        logits = np.zeros((R, tree.size, V))
        lower = 0 if above is None else 1
        with np.errstate(divide="ignore"):
            logits[:, lower] = np.log(p)
        if above is not None:
            logits[:, 0] = np.where(np.arange(V) == above[:, None], 0.0, -np.inf)
            tokens = np.concatenate([above[:, None], tokens], axis=1)
        present = np.ones((R, tree.size), bool)
        if valid is not None:
            present[:, tree.size - k :] = valid
        draft = verify.Draft(
            jnp.asarray(np.concatenate([np.zeros((R, 1)), tokens], axis=1), jnp.int32),
            tree_tables(jnp.broadcast_to(jnp.asarray(tree.parents, jnp.int32), (R, tree.size)), tree.depth),
            jnp.asarray(present),
        )
        rows = sampling_rows([params] * R, [0] * R, [[]] * R, V)
        counts = TokenCounts(
            jnp.zeros((R, V), bool), jnp.broadcast_to(jnp.asarray(np.zeros(V) if counted is None else counted, jnp.int32)[None], (R, V))
        )
        chances: list[jax.Array] = []  # those of the call that is being traced

        def decide(attempts, final):
            chances[:] = [attempts, final]
            first = jnp.zeros(R, jnp.int32)
            with np.errstate(divide="ignore"):
                drafted = jnp.asarray(np.log(p if q is None else q), jnp.float32)
                certain = jnp.asarray(np.log(np.zeros((R, V)) if above is None else np.arange(V) == above[:, None]), jnp.float32)

            def of_node(node_B):
                return jnp.where((node_B == lower)[:, None], drafted, certain)

            rule = verify.point_mass(rows) if q is None else verify.rejection(rows, of_node)
            every = jnp.ones(R, bool)
            found = verify.verify(jnp.asarray(logits, jnp.float32), draft, rule, tree.depth, counts, rows, first, every)
            return found.token_BL[:, lower], found.accepted_B > lower

        def draw(log_weights_BV, rows, position_B, purpose, vocab_ranks=ONE):
            """Return the probability of the token ``final`` instead of a token; at the root above the node only one token is possible."""
            probability_B = jax.nn.softmax(log_weights_BV)[:, chances[1]]
            encoded_B = (probability_B * SCALE).astype(jnp.int32)
            return jnp.where(position_B == lower, encoded_B, jnp.argmax(log_weights_BV, axis=1).astype(jnp.int32))

        def attempt(key_B2):
            position_B, tried = key_B2
            return jnp.where(position_B == lower, chances[0][:, jnp.minimum(tried, k - 1)], 0.0)

        monkeypatch.setattr(sampling, "draw", draw)
        monkeypatch.setattr(verify, "draw", draw)
        monkeypatch.setattr(verify, "stream_keys", lambda _, position_B, purpose, tried: (position_B, tried))
        monkeypatch.setattr(verify, "uniform", attempt)
        self.shape = R, 0 if q is None else k  # children on which a number of their own decides
        self.outcome = jax.jit(decide)

    def _accepts(self, i, attempts, final):
        """Whether it is child ``i`` that is accepted."""
        token, accepted = map(np.asarray, self.outcome(attempts, final))
        return accepted & (token == self.tokens[:, i])

    def distribution(self):
        """The probability that each token is emitted here [R, V], and that it is an accepted draft [R]."""
        R, k = self.shape
        result, left = np.zeros((R, V)), np.ones(R)
        attempts, final = np.ones((R, max(k, 1)), np.float32), np.int32(0)
        for i in range(k):
            low, high = np.zeros(R), np.ones(R)  # accepted below, not above
            for _ in range(BISECTIONS):
                attempts[:, i] = (low + high) / 2
                accepts = self._accepts(i, attempts, final)
                low, high = np.where(accepts, attempts[:, i], low), np.where(accepts, high, attempts[:, i])
            attempts[:, i] = low * (1 - 1e-6)
            chance = np.where(self._accepts(i, attempts, final), low, 0.0)
            result[np.arange(R), self.tokens[:, i]] += left * chance
            left = left * (1 - chance)
            attempts[:, i] = 1.0
        last = np.stack([np.asarray(self.outcome(attempts, np.int32(token))[0]) / SCALE for token in range(V)], axis=1)
        return result + left[:, None] * last, 1 - left


def orders(q, k):
    """Every order of k tokens drawn one after the other without putting back: (tokens [O, k], probabilities [R, O])."""
    tokens = np.array(list(itertools.permutations(range(V), k)))
    chance, left = np.ones((len(q), len(tokens))), np.ones((len(q), len(tokens)))
    for i in range(k):
        chance *= q[:, tokens[:, i]] / np.where(left > 0, left, 1.0)
        taken = (tokens[:, : i + 1, None] == np.arange(V)).any(1)
        left = np.where(taken, 0.0, q[:, None, :]).sum(-1)  # summed anew: what is left may be tiny
    return tokens, chance


def by_order(p, q, k, monkeypatch, *, verified=None, keep=None, arrange=None, above=False, **penalties):
    """The distribution of the emitted token for each (p, q), over all orders that k children may be drawn in from q.

    ``verified``: what the verifier is told they were drawn from. ``arrange`` reorders each row's children, ``keep`` says which are valid.
    """
    tokens, chance = orders(q, k)
    pairs, count = len(p), len(tokens)
    R = pairs * count
    p_RV, q_RV = np.repeat(p, count, axis=0), np.repeat(q if verified is None else verified, count, axis=0)
    tokens_Rk = np.tile(tokens, (pairs, 1))
    if arrange is not None:
        tokens_Rk = arrange(tokens_Rk, np.repeat(q, count, axis=0))
    valid = None if keep is None else keep(tokens_Rk, np.repeat(q, count, axis=0))
    node = Node(p_RV, q_RV, tokens_Rk, monkeypatch, valid=valid, above=np.full(R, ABOVE) if above else None, **penalties)
    found, accepted = node.distribution()
    weighted = chance[:, :, None] * found.reshape(pairs, count, V)
    return weighted.sum(1), (chance * accepted.reshape(pairs, count)).sum(1)


def error(found, p):
    """Mean total variation."""
    return np.abs(found - p).sum(1).mean() / 2


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_rejection_gives_the_target_s_distribution(k, above, monkeypatch):
    p, q = distributions(30, 0), distributions(30, 1)
    found, accepted = by_order(p, q, k, monkeypatch, above=above)
    assert np.abs(found - p).max() < 1e-6
    if k == 1:
        assert np.abs(accepted - np.minimum(p, q).sum(1)).max() < 1e-6


@pytest.mark.parametrize("drawn", [False, True], ids=["rejection", "point mass"])
def test_a_penalty_counts_what_was_accepted_on_the_way(drawn, monkeypatch):
    """Of the token above the node once more than at the root."""
    p, q = distributions(30, 0), distributions(30, 1)
    counted = np.array([1, 0, 2, 1, 0])
    penalised = p * np.exp(-0.7 * (counted + (np.arange(V) == ABOVE)))
    penalised /= penalised.sum(1, keepdims=True)
    penalties = {"params": SamplingParams(temperature=1.0, frequency_penalty=0.7), "counted": counted}
    if drawn:
        likeliest = np.argsort(-q, axis=1)[:, :2]
        found, _ = Node(p, None, likeliest, monkeypatch, above=np.full(30, ABOVE), **penalties).distribution()
    else:
        found, _ = by_order(p, q, 2, monkeypatch, above=True, **penalties)
    assert np.abs(found - penalised).max() < 1e-6


@pytest.mark.parametrize("k", [2, 3])
def test_rejection_where_nothing_is_left_that_float32_holds(k, monkeypatch):
    """A confident drafter at a low temperature: once its likeliest token is gone, the others' probabilities are below any float32."""
    p = distributions(30, 0)
    with np.errstate(under="ignore"):
        q = distributions(30, 1, sharpness=1.0) * np.exp([0.0, -120.0, -121.0, -240.0, -241.0])
    q /= q.sum(1, keepdims=True)
    found, _ = by_order(p, q, k, monkeypatch)
    assert np.abs(found - p).max() < 1e-6


def test_more_children_are_accepted_more_often(monkeypatch):
    p, q = distributions(30, 0), distributions(30, 1)
    rates = [by_order(p, q, k, monkeypatch)[1].mean() for k in (1, 2, 3)]
    assert rates[0] < rates[1] < rates[2]


@pytest.mark.parametrize("above", [False, True])
def test_any_children_are_as_good_for_drawn_tokens(above, monkeypatch):
    """Likeliest ones, sorted ones, pruned ones: only the model's tokens are emitted."""
    p, q = distributions(60, 0), distributions(60, 1)
    for tokens in (np.argsort(-q, axis=1)[:, :3], np.argsort(q, axis=1)[:, :2], np.argsort(-p, axis=1)[:, :1]):
        found, _ = Node(p, None, tokens, monkeypatch, above=np.full(60, ABOVE) if above else None).distribution()
        assert np.abs(found - p).max() < 1e-6


def likeliest_first(tokens, q):
    return np.take_along_axis(tokens, np.argsort(-np.take_along_axis(q, tokens, axis=1), axis=1, kind="stable"), axis=1)


def best_two(tokens, q):
    """Of three in their order, without the least likely."""
    worst = np.argmin(np.take_along_axis(q, tokens, axis=1), axis=1)
    return np.array([np.delete(row, i) for row, i in zip(tokens, worst, strict=True)])


def test_mistakes_are_caught(monkeypatch):
    """What engines have got wrong, each with the error that exact enumeration finds for it elsewhere as the order of magnitude."""
    p, q = distributions(60, 0), distributions(60, 1)
    sharper = q ** (1 / 0.6) / (q ** (1 / 0.6)).sum(1, keepdims=True)
    mistakes = {
        "siblings in the order of their probability": lambda: by_order(p, q, 3, monkeypatch, arrange=likeliest_first),
        "the best two of three": lambda: by_order(p, q, 3, monkeypatch, arrange=best_two),
        "an unlikely token dropped": lambda: by_order(
            p, q, 1, monkeypatch, keep=lambda tokens, q: np.take_along_axis(q, tokens, axis=1) >= 0.15
        ),
        "drafted at another temperature": lambda: by_order(p, sharper, 1, monkeypatch, verified=q),
        "the likeliest taken for drawn": lambda: Node(p, q, np.argsort(-q, axis=1)[:, :3], monkeypatch).distribution(),
    }
    for name, mistake in mistakes.items():
        assert error(mistake()[0], p) > 1e-2, name
    assert error(by_order(p, q, 3, monkeypatch)[0], p) < 1e-6
    monkeypatch.setattr(verify, "without", lambda q_BV, *_: q_BV)  # later siblings as if the first had been put back
    assert error(by_order(p, q, 3, monkeypatch)[0], p) > 5e-3


def test_a_walk_goes_down_and_gives_what_follows():
    """Greedy over two rows and a tree of two branches: one row takes both levels, the other only finds its first token."""
    tree = StaticTree.from_paths([[0], [1], [0, 0], [1, 0]])
    likeliest = {0: [4, 2], 1: [0, 0], 2: [3, 1], 3: [0, 0], 4: [1, 4]}
    logits = np.zeros((2, 5, V), np.float32)
    for node, tokens in likeliest.items():
        logits[np.arange(2), node, tokens] = 9.0
    draft = verify.Draft(
        jnp.asarray([[0, 1, 4, 2, 3], [0, 1, 2, 4, 3]], jnp.int32),
        tree_tables(jnp.asarray([tree.parents] * 2, jnp.int32), 2),
        jnp.ones((2, 5), bool),
    )
    greedy = SamplingParams(temperature=0.0, logprobs=0)
    rows = sampling_rows([greedy] * 2, [0, 0], [[], []], V)
    zeros = jnp.zeros(2, jnp.int32)

    def walk(draft, active=(True, True)):
        rule = verify.point_mass(rows)
        return verify.verify(jnp.asarray(logits), draft, rule, 2, NO_COUNTS, rows, zeros, jnp.asarray(active))

    found = walk(draft)
    assert found.token_BL.tolist() == [[4, 3, 1], [2, 1, NONE]]
    assert found.node_BL.tolist() == [[0, 2, 4], [0, 2, 0]]
    assert found.accepted_B.tolist() == [2, 1]
    assert np.abs(np.asarray(found.logprobs.chosen_B)[0] - (9 - np.log(np.exp(9.0) + 4))).max() < 1e-5
    # What is not valid is not there; a row that is not active gives nothing.
    short = verify.Draft(draft.token_BN, draft.tree, draft.valid_BN.at[0, 4].set(False))
    assert walk(short).token_BL.tolist() == [[4, 3, NONE], [2, 1, NONE]]
    assert walk(draft, active=(False, True)).token_BL.tolist() == [[NONE] * 3, [2, 1, NONE]]


def test_logits_that_are_not_finite_end_a_row():
    tree = StaticTree.chain(1)
    draft = verify.Draft(jnp.zeros((1, 2), jnp.int32), tree_tables(jnp.asarray([tree.parents], jnp.int32), 1), jnp.ones((1, 2), bool))
    params = SamplingParams()
    rows = sampling_rows([params], [0], [[]], V)
    for rule in (verify.point_mass(rows), verify.rejection(rows, lambda _: jnp.full((1, V), -np.log(V), jnp.float32))):
        logits = jnp.full((1, 2, V), jnp.nan)
        found = verify.verify(logits, draft, rule, 1, NO_COUNTS, rows, jnp.zeros(1, jnp.int32), jnp.ones(1, bool))
        assert found.token_BL.tolist() == [[sampling.NOT_FINITE, NONE]] and found.accepted_B.tolist() == [0]

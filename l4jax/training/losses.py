"""What a drafter is trained to do, and how it is measured.

At position t a drafter reads the target's state at t and token t + 1. Its output estimates the target's state at t + 1; it is compared
with that state and with the target's distribution of token t + 2. In pass i the drafter reads its own output of the pass before, at
t - 1, in place of the target's state: that is the i-th guess of a chain that starts at t - i (see ``model.steps.packed``).

EAGLE-1 (arXiv 2401.15077) learns the target's final states, in one pass. EAGLE-3 (arXiv 2503.01840) learns the target's distribution,
in several passes over its own output, as when it drafts; the tokens are those of the text in every pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from l4jax.model.drafter import Drafter
from l4jax.model.llama import Llama
from l4jax.model.steps.packed import PackedCache, packed_step, shifted
from l4jax.training.batches import Rows
from sharding.ranks import Ranks

PASS_DECAY = 0.8
"""EAGLE-3: the weight of a pass, relative to the one before."""
STATE_NOISE = 0.2
"""EAGLE-1: width of the uniform noise on the target's states; when drafting, the drafter reads states with errors of its own."""
DISTRIBUTION_WEIGHT = 0.1
"""EAGLE-1: the weight of the cross-entropy, relative to the distance of the states."""


def unroll(drafter: Drafter, target: Llama, rows: Rows, hidden_BTD: Array, passes: int) -> Iterator[Float[Array, "B T D"]]:
    """The drafter's output in each pass; ``hidden_BTD`` is what it reads in the first."""
    config = drafter.config.decoder
    next_BT = shifted(rows.token_BT, 1)
    cache: tuple[PackedCache, ...] = (PackedCache(),) * config.num_layers
    for index in range(passes):
        with jax.named_scope(f"pass_{index}"):
            step = packed_step(config, rows.first_BT, index)
            hidden_BTD, cache = drafter(target, next_BT, hidden_BTD, step, cache)
            yield hidden_BTD
            hidden_BTD = shifted(hidden_BTD, -1)


def guesses(rows: Rows, index: int) -> Bool[Array, "B T"]:
    """A mask of the guesses that count in a pass: the guessed token and the chain's root must be in the same answer, as when drafting."""
    position_1T = jnp.arange(rows.token_BT.shape[1], dtype=jnp.int32)[None]
    guessed_BT, root_BT = shifted(rows.answer_BT, 2), shifted(rows.answer_BT, 1 - index)
    return guessed_BT & root_BT & (shifted(rows.first_BT, 2) <= position_1T - index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measured:
    """For each pass, over this device's rows: the sum of its losses, the positions counted, the hits and the guesses.

    A hit is a guess whose likeliest token is the target's.
    """

    loss_d: Float32[Array, "d"]
    counted_d: Float32[Array, "d"]
    hits_d: Float32[Array, "d"]
    guesses_d: Float32[Array, "d"]

    @classmethod
    def stack(cls, passes: list[tuple[Array, Array, Array, Array]]) -> Measured:
        """From the four arrays of each pass, which are summed."""
        return cls(*(jnp.stack([jnp.sum(part, dtype=jnp.float32) for part in parts]) for parts in zip(*passes, strict=True)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetStates:
    """The target's states over some rows: what its output head reads, and what the drafter reads (see :class:`Llama`)."""

    final_BTD: Float[Array, "B T D"]
    feature_BTf: Float[Array, "B T f"]


Learning = Callable[[Drafter], Measured]
"""Measures a drafter on a batch. The target's part is already computed, once, and no gradient flows through it."""


def learning(drafter: Drafter, target: Llama, rows: Rows, states: TargetStates, passes: int, noise: Array) -> Learning:
    """The measurement of drafters of this shape against the target's states over the rows.

    ``passes``: of an EAGLE-3 drafter. ``noise``: the random key of an EAGLE-1 drafter's noise.
    """
    with jax.named_scope("target"):
        next_BTD, feature_BTf = shifted(states.final_BTD, 1), states.feature_BTf.astype(jnp.float32)
        if drafter.config.version == "eagle1":
            return _eagle1(target, rows, next_BTD, feature_BTf, noise)
        return _eagle3(drafter, target, rows, next_BTD, feature_BTf, passes)


def _eagle3(drafter: Drafter, target: Llama, rows: Rows, next_BTD: Array, feature_BTf: Array, passes: int) -> Learning:
    """Cross-entropy with the target's distribution over the draft vocabulary, where that has the target's likeliest token."""
    token_ids_V = drafter.target_tokens(jnp.arange(drafter.config.draft_vocab_size, dtype=jnp.int32))

    def row(x_TD: Array) -> tuple[Array, Array, Array]:
        logits_TV = target.logits(x_TD)
        draft_TV = logits_TV[:, token_ids_V]
        inside_T = jnp.max(draft_TV, axis=-1) >= jnp.max(logits_TV, axis=-1)
        return jax.nn.softmax(draft_TV, axis=-1), jnp.argmax(draft_TV, axis=-1).astype(jnp.int32), inside_T

    # Row by row: the logits over the target's vocabulary are many times as large as everything else.
    probability_BTV, likeliest_BT, inside_BT = jax.lax.map(row, next_BTD)

    def measure(drafter: Drafter) -> Measured:
        measured = []
        for index, hidden_BTD in enumerate(unroll(drafter, target, rows, drafter.read(feature_BTf), passes)):
            logits_BTV = drafter.logits(target, hidden_BTD)
            loss_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.sum(probability_BTV * logits_BTV, axis=-1)
            guess_BT = guesses(rows, index)
            counted_BT = guess_BT & inside_BT
            hit_BT = counted_BT & _is_highest(logits_BTV, likeliest_BT)
            measured.append((jnp.where(counted_BT, loss_BT, 0.0), counted_BT, hit_BT, guess_BT))
        return Measured.stack(measured)

    return measure


def _eagle1(target: Llama, rows: Rows, next_BTD: Array, feature_BTf: Array, noise: Array) -> Learning:
    """Smooth L1 distance from the target's next state, and cross-entropy with its distribution."""

    def row(x_TD: Array) -> tuple[Array, Array]:
        logits_TV = target.logits(x_TD)
        probability_TV = jax.nn.softmax(logits_TV, axis=-1).astype(target.output_table.dtype)
        expected_TD = jnp.einsum("tv,vd->td", probability_TV, target.output_table, preferred_element_type=jnp.float32)
        return expected_TD, jnp.argmax(logits_TV, axis=-1).astype(jnp.int32)

    def noise_of(number: Array) -> Array:  # depends on the row, not on the device that has it
        return STATE_NOISE * (jax.random.uniform(jax.random.fold_in(noise, number), feature_BTf.shape[1:]) - 0.5)

    expected_BTD, likeliest_BT = jax.lax.map(row, next_BTD)
    noisy_BTf = feature_BTf + jax.vmap(noise_of)(rows.number_B)

    def measure(drafter: Drafter) -> Measured:
        @jax.checkpoint
        def row(parts: tuple[Array, Array]) -> tuple[Array, Array]:
            hidden_TD, likeliest_T = parts
            logits_TV = drafter.logits(target, hidden_TD)
            return jax.nn.logsumexp(logits_TV, axis=-1), _is_highest(logits_TV, likeliest_T)

        (hidden_BTD,) = unroll(drafter, target, rows, drafter.read(noisy_BTf), 1)
        distance_BT = jnp.mean(_smooth_l1(hidden_BTD - next_BTD.astype(jnp.float32)), axis=-1)
        normalizer_BT, highest_BT = jax.lax.map(row, (hidden_BTD, likeliest_BT))
        # The entropy is linear in the logits: the expected row of the head times the state equals the expected logit.
        entropy_BT = normalizer_BT - jnp.sum(expected_BTD * hidden_BTD, axis=-1)
        loss_BT = distance_BT + DISTRIBUTION_WEIGHT * entropy_BT
        guess_BT = guesses(rows, 0)
        return Measured.stack([(jnp.where(guess_BT, loss_BT, 0.0), guess_BT, guess_BT & highest_BT, guess_BT)])

    return measure


def _smooth_l1(x: Array) -> Array:
    size = jnp.abs(x)
    return jnp.where(size < 1.0, 0.5 * x * x, size - 0.5)


def _is_highest(logits_TV: Array, index_T: Array) -> Array:
    at_index_T = jnp.take_along_axis(logits_TV, jnp.maximum(index_T, 0)[..., None], axis=-1)[..., 0]
    return at_index_T >= jnp.max(logits_TV, axis=-1)


def accepted(drafter: Drafter, target: Llama, rows: Rows, states: TargetStates, passes: int) -> Int32[Array, "B T"]:
    """For each position: of ``passes`` drafts in a chain whose root is the next token, how many equal the text before one differs."""
    hidden_BTD = drafter.read(states.feature_BTf.astype(jnp.float32))
    text_BT = shifted(rows.token_BT, 2)
    accepted_BT = jnp.ones(text_BT.shape, bool)
    count_BT = jnp.zeros(text_BT.shape, jnp.int32)
    for index, out_BTD in enumerate(unroll(drafter, target, rows, hidden_BTD, passes)):
        guess_BT = jax.lax.map(lambda x_TD: jnp.argmax(drafter.logits(target, x_TD), axis=-1).astype(jnp.int32), out_BTD)
        hit_BT = guesses(rows, index) & (drafter.target_tokens(guess_BT) == text_BT)
        accepted_BT = accepted_BT & shifted(hit_BT, index)  # at the position where the chain starts
        count_BT = count_BT + accepted_BT.astype(jnp.int32)
    return count_BT


def mean_loss(measured: Measured, data: Ranks) -> Float32[Array, ""]:
    """This device's part of the loss: each pass's mean over all devices' positions, with less weight for later passes."""
    counted_d = jnp.maximum(data.sum(jax.lax.stop_gradient(measured.counted_d)), 1.0)
    decay_d = PASS_DECAY ** jnp.arange(len(counted_d), dtype=jnp.float32)
    return jnp.sum(decay_d * measured.loss_d / counted_d)

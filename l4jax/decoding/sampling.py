"""Sampling on the device: logit processors, truncation and the draw, for a batch in which every row has its own settings.

Nothing here sorts the vocabulary or draws a number per token: cuts are thresholds found by bisection and the draw inverts
the cumulative distribution with one uniform number a row, keyed by (request seed, output position).

On a mesh each rank of ``vocab`` has a part of the vocabulary, in order, and the logits are never gathered: ranks exchange maxima,
sums and candidates, a few numbers a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Key, UInt32

from l4jax.arrays import host_array
from l4jax.decoding.params import MAX_LOGPROBS, SamplingParams
from sharding.ranks import ONE, Ranks, local_index

NOT_FINITE = -2
"""In the place of a token: the logits had a NaN or an infinity, or no token at all was left."""
_ONE_BITS = 0x3F800000  # the bit pattern of float32 1.0; patterns of non-negative floats are ordered as the floats are


@dataclasses.dataclass(frozen=True)
class SamplingFeatures:
    """What at least one row of a batch needs; each combination is a compiled program of its own.

    ``random``: a temperature above 0. ``adjusted``: a bias or penalty. ``logprobs``: log-probabilities reported.
    """

    random: bool
    adjusted: bool
    logprobs: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """Each row's settings, on the device. ``bias_id_Bj`` is padded with the vocabulary size, ``stop_Bj`` with -1."""

    temperature_B: Float32[Array, "B"]
    top_k_B: Int32[Array, "B"]
    top_p_B: Float32[Array, "B"]
    min_p_B: Float32[Array, "B"]
    repetition_B: Float32[Array, "B"]
    presence_B: Float32[Array, "B"]
    frequency_B: Float32[Array, "B"]
    key_B2: UInt32[Array, "B 2"]
    bias_id_Bj: Int32[Array, "B j"]
    bias_Bj: Float32[Array, "B j"]
    stop_Bj: Int32[Array, "B j"]
    max_tokens_B: Int32[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """What the penalties look at: which tokens the prompt holds, and how often the output does so far."""

    in_prompt_BV: Bool[Array, "B V"]
    output_BV: Int32[Array, "B V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of the chosen token and of the likeliest ones, under the model's own distribution."""

    chosen_B: Float32[Array, "B"]
    top_Bj: Float32[Array, "B j"]
    top_id_Bj: Int32[Array, "B j"]


def batch_features(params: Sequence[SamplingParams]) -> SamplingFeatures:
    """The features that a batch needs."""
    return SamplingFeatures(
        random=any(p.temperature > 0 for p in params),
        adjusted=any(p.adjusts_logits for p in params),
        logprobs=any(p.logprobs is not None for p in params),
    )


def sampling_rows(
    params: Sequence[SamplingParams], seeds: Sequence[int], stop_ids: Sequence[Sequence[int]], vocab_size: int
) -> SamplingRows:
    """Stack the settings of a batch, as host arrays. Lists are padded to a power of two, so that few shapes are compiled."""

    def stack(name: str, dtype: type) -> Array:
        return host_array([getattr(p, name) for p in params], dtype)

    bias_ids = [list(p.logit_bias) for p in params]
    bias_values = [list(p.logit_bias.values()) for p in params]
    return SamplingRows(
        temperature_B=stack("temperature", np.float32),
        top_k_B=stack("top_k", np.int32),
        top_p_B=stack("top_p", np.float32),
        min_p_B=stack("min_p", np.float32),
        repetition_B=stack("repetition_penalty", np.float32),
        presence_B=stack("presence_penalty", np.float32),
        frequency_B=stack("frequency_penalty", np.float32),
        key_B2=host_array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32),
        bias_id_Bj=_pad(bias_ids, vocab_size, np.int32),
        bias_Bj=_pad(bias_values, 0.0, np.float32),
        stop_Bj=_pad(stop_ids, -1, np.int32),
        max_tokens_B=stack("max_tokens", np.int32),
    )


def _pad(lists: Sequence[Sequence[float]], fill: float, dtype: type) -> Array:
    longest = max(8, *(len(row) for row in lists))
    width = 1 << (longest - 1).bit_length()
    return host_array([[*row, *[fill] * (width - len(row))] for row in lists], dtype)


def sample(
    logits_BV: Float32[Array, "B V"],
    rows: SamplingRows,
    counts: TokenCounts | None,
    position_B: Int32[Array, "B"],
    features: SamplingFeatures,
    vocab: Ranks = ONE,
) -> tuple[Int32[Array, "B"], Logprobs | None]:
    """The next token of each row, ``position_B[b]`` tokens into its output; ``counts`` is needed if ``adjusted``.

    A row whose logits are not finite gets :data:`NOT_FINITE`. The result is the same on every rank of ``vocab``.
    """
    with jax.named_scope("sample"):
        adjusted_BV, highest_B, token_B = _likeliest(logits_BV, rows, counts, features, vocab)
        if features.random:
            weights_BV = truncated_weights(adjusted_BV, rows, highest_B, vocab)
            drawn_B = draw(weights_BV, uniform(rows.key_B2, position_B), vocab)
            token_B = jnp.where(rows.temperature_B > 0, drawn_B, token_B)
        token_B = jnp.where(jnp.isfinite(highest_B), token_B, NOT_FINITE)
        return token_B, token_logprobs(logits_BV, token_B, vocab) if features.logprobs else None


def probabilities(
    logits_BV: Float32[Array, "B V"], rows: SamplingRows, counts: TokenCounts | None, features: SamplingFeatures, vocab: Ranks = ONE
) -> tuple[Float32[Array, "B V"], Bool[Array, "B"]]:
    """The distribution that :func:`sample` draws from, all on one token at temperature 0; and in which rows it is one."""
    adjusted_BV, highest_B, token_B = _likeliest(logits_BV, rows, counts, features, vocab)
    index_B = local_index(token_B, logits_BV.shape[1], vocab)
    weights_BV = jax.nn.one_hot(index_B, logits_BV.shape[1], dtype=jnp.float32)
    if features.random:
        drawn_BV = truncated_weights(adjusted_BV, rows, highest_B, vocab)
        weights_BV = jnp.where(rows.temperature_B[:, None] > 0, drawn_BV, weights_BV)
    return weights_BV / vocab.sum(jnp.sum(weights_BV, axis=-1))[:, None], jnp.isfinite(highest_B)


def _likeliest(
    logits_BV: Array, rows: SamplingRows, counts: TokenCounts | None, features: SamplingFeatures, vocab: Ranks
) -> tuple[Array, Array, Array]:
    """The adjusted logits, the highest of each row, and its token."""
    if features.adjusted:
        assert counts is not None
        logits_BV = adjust_logits(logits_BV, rows, counts, vocab)
    highest_B = _highest(logits_BV, vocab)
    return logits_BV, highest_B, _find(logits_BV, highest_B, vocab)


def _highest(logits_BV: Array, vocab: Ranks) -> Array:
    """The highest logit of each row; infinity where there is a NaN, which a maximum over ranks might lose."""
    highest_B = jnp.max(logits_BV, axis=-1)
    return vocab.max(jnp.where(jnp.isnan(highest_B), jnp.inf, highest_B))


def _find(logits_BV: Array, highest_B: Array, vocab: Ranks) -> Array:
    """The first token with this logit."""
    V = logits_BV.shape[1]
    token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    has_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0] == highest_B
    # The lowest of the ranks' tokens, as the highest of their negatives.
    return -vocab.max(-jnp.where(has_B, token_B + vocab.index() * V, V * vocab.count))


def adjust_logits(logits_BV: Float32[Array, "B V"], rows: SamplingRows, counts: TokenCounts, vocab: Ranks = ONE) -> Float32[Array, "B V"]:
    """Bias, then repetition (CTRL, arXiv 1909.05858), presence and frequency penalties."""
    row_B1 = jnp.arange(logits_BV.shape[0], dtype=jnp.int32)[:, None]
    bias_id_Bj = local_index(rows.bias_id_Bj, logits_BV.shape[1], vocab)
    logits_BV = logits_BV.at[row_B1, bias_id_Bj].add(rows.bias_Bj, mode="drop")
    in_output_BV = counts.output_BV > 0
    repetition_BV = jnp.where(counts.in_prompt_BV | in_output_BV, rows.repetition_B[:, None], 1.0)
    logits_BV = jnp.where(logits_BV > 0, logits_BV / repetition_BV, logits_BV * repetition_BV)
    once_BV = jnp.where(in_output_BV, rows.presence_B[:, None], 0.0)
    return logits_BV - once_BV - rows.frequency_B[:, None] * counts.output_BV.astype(jnp.float32)


def truncated_weights(
    logits_BV: Float32[Array, "B V"], rows: SamplingRows, highest_B: Float32[Array, "B"], vocab: Ranks = ONE
) -> Float32[Array, "B V"]:
    """Unnormalised probabilities after temperature, min-p, top-k and top-p; the likeliest token, of logit ``highest_B``, has weight 1."""
    temperature_B = jnp.where(rows.temperature_B > 0, rows.temperature_B, 1.0)
    weights_BV = jnp.exp((logits_BV - highest_B[:, None]) / temperature_B[:, None])
    weights_BV = jnp.where(weights_BV >= rows.min_p_B[:, None], weights_BV, 0.0)

    wanted_B = rows.top_k_B.astype(jnp.float32)
    weights_BV = _cut(weights_BV, lambda count_B, _: count_B >= wanted_B, rows.top_k_B <= 0, vocab)
    mass_B = rows.top_p_B * vocab.sum(jnp.sum(weights_BV, axis=-1))
    return _cut(weights_BV, lambda _, sum_B: sum_B >= mass_B, rows.top_p_B >= 1, vocab)


def _cut(weights_BV: Array, enough: Callable[[Array, Array], Array], unlimited_B: Array, vocab: Ranks) -> Array:
    """Zero the weights below the highest threshold that still keeps ``enough(count, sum)`` of them.

    Bisects over the bit patterns of float32 in [0, 1]; a row is settled once at most one weight lies between its bounds. Counts
    are float32 to be summed over the ranks together with the sums: exact up to 2**24 tokens.
    """
    bits_BV = jax.lax.bitcast_convert_type(weights_BV, jnp.int32)

    def unsettled(state: tuple[Array, Array, Array, Array]) -> Array:
        low_B, high_B, count_low_B, count_high_B = state
        return jnp.any((high_B - low_B > 1) & (count_low_B - count_high_B > 1) & ~unlimited_B)

    def halve(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        low_B, high_B, count_low_B, count_high_B = state
        middle_B = low_B + (high_B - low_B) // 2
        kept_BV = bits_BV >= middle_B[:, None]
        kept_B2 = [jnp.sum(kept_BV, axis=-1, dtype=jnp.float32), jnp.sum(jnp.where(kept_BV, weights_BV, 0.0), axis=-1)]
        count_B, sum_B = vocab.sum(jnp.stack(kept_B2))
        ok_B = enough(count_B, sum_B)
        return (
            jnp.where(ok_B, middle_B, low_B),
            jnp.where(ok_B, high_B, middle_B),
            jnp.where(ok_B, count_B, count_low_B),
            jnp.where(ok_B, count_high_B, count_B),
        )

    shape = weights_BV.shape[:1]
    everything = jnp.full(shape, weights_BV.shape[1] * vocab.count, jnp.float32)
    start = (jnp.zeros(shape, jnp.int32), jnp.full(shape, _ONE_BITS + 1, jnp.int32), everything, jnp.zeros(shape, jnp.float32))
    low_B = jnp.where(unlimited_B, 0, jax.lax.while_loop(unsettled, halve, start)[0])
    return jnp.where(bits_BV >= low_B[:, None], weights_BV, 0.0)


def position_keys(key_B2: UInt32[Array, "B 2"], position_B: Int32[Array, "B"]) -> Key[Array, "B"]:
    """A key a row, a function of (seed, output position) alone."""

    def one(key_2: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), position)

    return jax.vmap(one)(key_B2, position_B)


def uniform(key_B2: UInt32[Array, "B 2"], position_B: Int32[Array, "B"]) -> Float32[Array, "B"]:
    """One number in [0, 1) a row, a function of (seed, output position) alone."""
    return jax.vmap(jax.random.uniform)(position_keys(key_B2, position_B))


def draw(weights_BV: Float32[Array, "B V"], uniform_B: Float32[Array, "B"], vocab: Ranks = ONE) -> Int32[Array, "B"]:
    """Invert the cumulative distribution, in vocabulary order and by levels: find the rank, the block, then the token in it.

    The result always has a positive weight, whatever rounding does to the sums.
    """
    B, V = weights_BV.shape
    width = 128
    blocks_BnW = jnp.pad(weights_BV, ((0, 0), (0, -V % width))).reshape(B, -1, width)
    sums_Bn = jnp.sum(blocks_BnW, axis=-1)
    sums_BR = vocab.gather(jnp.sum(sums_Bn, axis=-1)).T
    rank_B, left_B = _locate(sums_BR, uniform_B * jnp.sum(sums_BR, axis=-1))
    block_B, left_B = _locate(sums_Bn, left_B)
    within_B, _ = _locate(jnp.take_along_axis(blocks_BnW, block_B[:, None, None], axis=1)[:, 0], left_B)
    token_B = rank_B * V + block_B * width + within_B
    return vocab.sum(jnp.where(rank_B == vocab.index(), token_B, 0))


def _locate(weights_Bn: Array, target_B: Array) -> tuple[Array, Array]:
    """Where the running sum passes the target, and what is left of the target before that entry.

    Only entries with weight count: prefix sums computed in parallel may wobble in the last bit across a zero.
    """
    cumulative_Bn = jnp.cumsum(weights_Bn, axis=-1)
    positive_Bn = weights_Bn > 0
    passed_Bn = positive_Bn & (cumulative_Bn > target_B[:, None])
    last_B = weights_Bn.shape[1] - 1 - jnp.argmax(positive_Bn[:, ::-1], axis=-1)
    index_B = jnp.where(jnp.any(passed_Bn, axis=-1), jnp.argmax(passed_Bn, axis=-1), last_B).astype(jnp.int32)
    return index_B, target_B - (_pick(cumulative_Bn, index_B) - _pick(weights_Bn, index_B))


def _pick(values_Bn: Array, index_B: Array) -> Array:
    return jnp.take_along_axis(values_Bn, index_B[:, None], axis=1)[:, 0]


def empty_logprobs(leading: tuple[int, ...], vocab_size: int) -> Logprobs:
    """Zeros shaped like the log-probabilities of ``leading`` tokens."""
    top = (*leading, min(MAX_LOGPROBS, vocab_size))
    return Logprobs(jnp.zeros(leading, jnp.float32), jnp.zeros(top, jnp.float32), jnp.zeros(top, jnp.int32))


def token_logprobs(logits_BV: Float32[Array, "B V"], token_B: Int32[Array, "B"], vocab: Ranks = ONE) -> Logprobs:
    """Log-probabilities of these tokens and of the likeliest ones."""
    V = logits_BV.shape[1]
    logprobs_BV = log_probabilities(logits_BV, vocab)
    index_B = local_index(token_B, V, vocab)
    chosen_B = vocab.sum(jnp.where(index_B < V, _pick(logprobs_BV, jnp.minimum(index_B, V - 1)), 0.0))
    return Logprobs(chosen_B, *highest_tokens(logprobs_BV, min(MAX_LOGPROBS, V * vocab.count), vocab))


def log_probabilities(logits_BV: Float32[Array, "B V"], vocab: Ranks = ONE) -> Float32[Array, "B V"]:
    """The log-softmax."""
    shifted_BV = logits_BV - _highest(logits_BV, vocab)[:, None]
    return shifted_BV - jnp.log(vocab.sum(jnp.sum(jnp.exp(shifted_BV), axis=-1, keepdims=True)))


def highest_tokens(values_BV: Float32[Array, "B V"], count: int, vocab: Ranks = ONE) -> tuple[Float32[Array, "B j"], Int32[Array, "B j"]]:
    """The ``count`` highest values of each row and their tokens, highest first; of equal ones the lower token comes first."""
    V = values_BV.shape[1]
    # The highest of all are among the highest of each rank.
    top_Bj, top_id_Bj = jax.lax.top_k(values_BV, min(count, V))
    if vocab.count == 1:
        return top_Bj, top_id_Bj.astype(jnp.int32)
    top_Bj = vocab.concatenate(top_Bj, axis=1)
    top_id_Bj = vocab.concatenate(top_id_Bj.astype(jnp.int32) + vocab.index() * V, axis=1)
    top_Bj, place_Bj = jax.lax.top_k(top_Bj, count)
    return top_Bj, jnp.take_along_axis(top_id_Bj, place_Bj, axis=1)

"""Sampling on the device: logit processors, truncation and the draw, for a batch in which every row has its own settings.

Nothing here sorts the vocabulary: cuts are thresholds found by bisection, and the draw is one maximum over perturbed logits, with Gumbel
noise keyed by (request seed, output position, token).

On a mesh each of ``vocab_ranks`` has a part of the vocabulary, in order, and the logits are never gathered: ranks exchange maxima,
sums and candidates, a few numbers a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from l4jax.decoding.params import MAX_BIASES, MAX_LOGPROBS, MAX_STOP_IDS, SamplingParams
from l4jax.decoding.randomness import Purpose, gumbel, stream_keys
from l4jax.parallel.arrays import host_array
from sharding.ranks import ONE, Ranks, local_index

NOT_FINITE = -2
"""Stands for a token where the logits had a NaN or an infinity, or every token was forbidden."""
_BLOCK = 128
_ONE_BITS = 0x3F800000  # the bit pattern of float32 1.0; patterns of non-negative floats are ordered as the floats are


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """Settings of several requests, on the device. ``bias_id_Bj`` is padded with the vocabulary size, ``stop_Bj`` with -1.

    ``adjusted_B``: something changes the logits before the temperature. ``reported_B``: log-probabilities are wanted.
    """

    adjusted_B: Bool[Array, "B"]
    reported_B: Bool[Array, "B"]
    temperature_B: Float32[Array, "B"]
    top_k_B: Int32[Array, "B"]
    top_p_B: Float32[Array, "B"]
    min_p_B: Float32[Array, "B"]
    repetition_B: Float32[Array, "B"]
    presence_B: Float32[Array, "B"]
    frequency_B: Float32[Array, "B"]
    seed_B2: UInt32[Array, "B 2"]
    bias_id_Bj: Int32[Array, "B j"]
    bias_Bj: Float32[Array, "B j"]
    stop_Bj: Int32[Array, "B j"]
    max_tokens_B: Int32[Array, "B"]
    min_tokens_B: Int32[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows(SamplingSettings):
    """The settings of a program's rows. ``slot_B``: where each row's counts are in :class:`TokenCounts`.

    ``allowed_BW``: of rows that are ``guided_B``, a bit for each token that may be next, that of token t in word t // 32. It holds for one
    token only.
    """

    slot_B: Int32[Array, "B"]
    guided_B: Bool[Array, "B"]
    allowed_BW: UInt32[Array, "B W"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """What the penalties read, for every slot: which tokens are in the prompt, and how often each is in the output so far."""

    in_prompt_UV: Bool[Array, "U V"]
    output_UV: Int32[Array, "U V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of the chosen token and of the likeliest ones, under the model's own distribution."""

    chosen_B: Float32[Array, "B"]
    top_Bj: Float32[Array, "B j"]
    top_id_Bj: Int32[Array, "B j"]


def sampling_settings(
    params: Sequence[SamplingParams], seeds: Sequence[int], stop_ids: Sequence[Sequence[int]], vocab_size: int
) -> SamplingSettings:
    """Stack the settings of several requests as host arrays. Lists are padded to the most that a request may have."""

    def stack(name: str, dtype: type) -> Array:
        return host_array([getattr(p, name) for p in params], dtype)

    bias_ids = [list(p.logit_bias) for p in params]
    bias_values = [list(p.logit_bias.values()) for p in params]
    return SamplingSettings(
        adjusted_B=stack("adjusts_logits", np.bool_),
        reported_B=host_array([p.logprobs is not None for p in params], np.bool_),
        temperature_B=stack("temperature", np.float32),
        top_k_B=stack("top_k", np.int32),
        top_p_B=stack("top_p", np.float32),
        min_p_B=stack("min_p", np.float32),
        repetition_B=stack("repetition_penalty", np.float32),
        presence_B=stack("presence_penalty", np.float32),
        frequency_B=stack("frequency_penalty", np.float32),
        seed_B2=host_array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32),
        bias_id_Bj=_pad(bias_ids, MAX_BIASES, vocab_size, np.int32),
        bias_Bj=_pad(bias_values, MAX_BIASES, 0.0, np.float32),
        stop_Bj=_pad(stop_ids, MAX_STOP_IDS, -1, np.int32),
        max_tokens_B=stack("max_tokens", np.int32),
        min_tokens_B=stack("min_tokens", np.int32),
    )


def mask_words(vocab_size: int) -> int:
    """Words of 32 bits that have a bit for each token."""
    return -(-vocab_size // 32)


def _pad(lists: Sequence[Sequence[float]], width: int, fill: float, dtype: type) -> Array:
    padded: np.ndarray = np.full((len(lists), width), fill, dtype)
    for row, values in zip(padded, lists, strict=True):
        row[: len(values)] = values
    return host_array(padded, dtype)


def sample(
    logits_BV: Float32[Array, "B V"], rows: SamplingRows, counts: TokenCounts, position_B: Int32[Array, "B"], vocab_ranks: Ranks = ONE
) -> Int32[Array, "B"]:
    """The next token of each row, ``position_B[b]`` tokens into its output; the same on all ``vocab_ranks``.

    A row whose logits are not finite gets :data:`NOT_FINITE`. Work that no row needs is not done.
    """

    def drawn(logits_BV: Array) -> tuple[Array, Array]:
        adjusted_BV = _adjusted(logits_BV, rows, counts, position_B, vocab_ranks)
        highest_B = _highest(adjusted_BV, vocab_ranks)
        log_weights_BV, kept_BV = truncate(adjusted_BV, rows, highest_B, vocab_ranks)
        return highest_B, draw(jnp.where(kept_BV, log_weights_BV, -jnp.inf), rows, position_B, Purpose.TOKEN, vocab_ranks)

    def likeliest(logits_BV: Array) -> tuple[Array, Array]:
        return highest_token(logits_BV, vocab_ranks)

    with jax.named_scope("sample"):
        highest_B, token_B = jax.lax.cond(_any_random(rows) | jnp.any(rows.adjusted_B), drawn, likeliest, logits_BV)
        return jnp.where(jnp.isfinite(highest_B), token_B, NOT_FINITE)


def probabilities(
    logits_BV: Float32[Array, "B V"], rows: SamplingRows, counts: TokenCounts, position_B: Int32[Array, "B"], vocab_ranks: Ranks = ONE
) -> tuple[Float32[Array, "B V"], Bool[Array, "B"]]:
    """The distribution that :func:`sample` draws from (at temperature 0 one token has it all), and whether each row's logits are finite."""
    V = logits_BV.shape[1]
    adjusted_BV = _adjusted(logits_BV, rows, counts, position_B, vocab_ranks)
    highest_B, token_B = highest_token(adjusted_BV, vocab_ranks)
    weights_BV = jax.nn.one_hot(local_index(token_B, V, vocab_ranks), V, dtype=jnp.float32)

    def with_drawn(weights_BV: Array) -> Array:
        log_weights_BV, kept_BV = truncate(adjusted_BV, rows, highest_B, vocab_ranks)
        drawn_BV = jnp.where(kept_BV, jnp.exp(log_weights_BV), 0.0)
        return jnp.where(rows.temperature_B[:, None] > 0, drawn_BV, weights_BV)

    weights_BV = jax.lax.cond(_any_random(rows), with_drawn, lambda weights_BV: weights_BV, weights_BV)
    return weights_BV / vocab_ranks.sum(jnp.sum(weights_BV, axis=-1))[:, None], jnp.isfinite(highest_B)


def _any_random(rows: SamplingRows) -> Bool[Array, ""]:
    return jnp.any(rows.temperature_B > 0)


def _adjusted(logits_BV: Array, rows: SamplingRows, counts: TokenCounts, position_B: Array, vocab_ranks: Ranks) -> Array:
    return jax.lax.cond(
        jnp.any(rows.adjusted_B),
        lambda logits_BV: adjust_logits(logits_BV, rows, counts, position_B, vocab_ranks),
        lambda logits_BV: logits_BV,
        logits_BV,
    )


def _highest(logits_BV: Array, vocab_ranks: Ranks) -> Array:
    """The highest logit of each row; infinity for a row with a NaN."""
    return vocab_ranks.max(jnp.max(_nan_to_infinity(logits_BV), axis=-1))


def _nan_to_infinity(values_BV: Array) -> Array:
    """Replace NaN by infinity: a maximum computed in vector registers, or over ranks, may lose a NaN, but keeps an infinity."""
    return jnp.where(jnp.isnan(values_BV), jnp.inf, values_BV)


def highest_token(values_BV: Float32[Array, "B V"], vocab_ranks: Ranks = ONE) -> tuple[Float32[Array, "B"], Int32[Array, "B"]]:
    """The highest value of each row, infinity where there is a NaN, and its token; of equal values the lowest token.

    One pass over the vocabulary takes the maximum of each block, and then only the best block is searched. XLA's argmax takes several times
    as long on CPUs. Comparing all values with the maximum might find none: XLA may compute them twice, with different rounding.
    """
    B, V = values_BV.shape
    values_BV = _nan_to_infinity(values_BV)
    blocks_Bbv = jnp.pad(values_BV, ((0, 0), (0, -V % _BLOCK)), constant_values=-jnp.inf).reshape(B, -1, _BLOCK)
    highest_Bb = jnp.max(blocks_Bbv, axis=-1)
    block_B = jnp.argmax(highest_Bb, axis=-1).astype(jnp.int32)
    own_B = _pick(highest_Bb, block_B)
    place_B = jnp.argmax(jnp.take_along_axis(blocks_Bbv, block_B[:, None, None], axis=1)[:, 0], axis=-1).astype(jnp.int32)
    highest_B = vocab_ranks.max(own_B)
    # The lowest of the ranks' tokens, as the highest of their negatives.
    token_B = jnp.where(own_B == highest_B, vocab_ranks.index() * V + block_B * _BLOCK + place_B, V * vocab_ranks.count - 1)
    return highest_B, -vocab_ranks.max(-token_B)


def adjust_logits(
    logits_BV: Float32[Array, "B V"], rows: SamplingRows, counts: TokenCounts, position_B: Int32[Array, "B"], vocab_ranks: Ranks = ONE
) -> Float32[Array, "B V"]:
    """Bias, then repetition (CTRL, arXiv 1909.05858), presence and frequency penalties.

    End tokens that come too early, and tokens that a guide does not allow, get -inf.
    """
    row_B1 = jnp.arange(logits_BV.shape[0], dtype=jnp.int32)[:, None]
    bias_id_Bj = local_index(rows.bias_id_Bj, logits_BV.shape[1], vocab_ranks)
    logits_BV = logits_BV.at[row_B1, bias_id_Bj].add(rows.bias_Bj, mode="drop")
    in_prompt_BV, output_BV = (of_slots.at[rows.slot_B].get(mode="clip") for of_slots in (counts.in_prompt_UV, counts.output_UV))
    in_output_BV = output_BV > 0
    repetition_BV = jnp.where(in_prompt_BV | in_output_BV, rows.repetition_B[:, None], 1.0)
    logits_BV = jnp.where(logits_BV > 0, logits_BV / repetition_BV, logits_BV * repetition_BV)
    once_BV = jnp.where(in_output_BV, rows.presence_B[:, None], 0.0)
    logits_BV = logits_BV - once_BV - rows.frequency_B[:, None] * output_BV.astype(jnp.float32)
    early_B1 = (position_B < rows.min_tokens_B)[:, None]
    stop_Bj = local_index(rows.stop_Bj, logits_BV.shape[1], vocab_ranks)
    logits_BV = logits_BV.at[row_B1, stop_Bj].add(jnp.where(early_B1, -jnp.inf, 0.0), mode="drop")
    return jnp.where(_is_allowed(rows, logits_BV.shape[1], vocab_ranks), logits_BV, -jnp.inf)


def _is_allowed(rows: SamplingRows, size: int, vocab_ranks: Ranks) -> Bool[Array, "B V"]:
    """Which of this rank's ``size`` tokens may be next."""
    token_V = vocab_ranks.index() * size + jnp.arange(size, dtype=jnp.int32)
    word_BV, bit_1V = rows.allowed_BW[:, token_V // 32], (token_V % 32).astype(jnp.uint32)[None, :]
    return ((word_BV >> bit_1V) & jnp.uint32(1)).astype(bool) | ~rows.guided_B[:, None]


def truncate(
    logits_BV: Float32[Array, "B V"], rows: SamplingRows, highest_B: Float32[Array, "B"], vocab_ranks: Ranks = ONE
) -> tuple[Float32[Array, "B V"], Bool[Array, "B V"]]:
    """Logarithms of unnormalised probabilities at each row's temperature, and which tokens min-p, top-k and top-p keep.

    The likeliest token, of logit ``highest_B``, has log-weight 0 and is always kept.
    """
    temperature_B = jnp.where(rows.temperature_B > 0, rows.temperature_B, 1.0)
    log_weights_BV = (logits_BV - highest_B[:, None]) / temperature_B[:, None]
    weights_BV = jnp.exp(log_weights_BV)
    bits_BV = jax.lax.bitcast_convert_type(weights_BV, jnp.int32)

    least_B = jnp.maximum(jax.lax.bitcast_convert_type(rows.min_p_B, jnp.int32), 1)  # a weight of zero is never kept
    wanted_B = rows.top_k_B.astype(jnp.float32)
    least_B = _highest_threshold(least_B, weights_BV, lambda count_B, _: count_B >= wanted_B, rows.top_k_B <= 0, vocab_ranks)
    mass_B = rows.top_p_B * vocab_ranks.sum(jnp.sum(jnp.where(bits_BV >= least_B[:, None], weights_BV, 0.0), axis=-1))
    least_B = _highest_threshold(least_B, weights_BV, lambda _, sum_B: sum_B >= mass_B, rows.top_p_B >= 1, vocab_ranks)
    return log_weights_BV, bits_BV >= least_B[:, None]


def _highest_threshold(
    least_B: Array, weights_BV: Array, enough: Callable[[Array, Array], Array], unlimited_B: Array, vocab_ranks: Ranks
) -> Array:
    """Raise the lowest kept weight as far as ``enough(count, sum)`` of the weights kept still holds.

    Thresholds are bit patterns of float32 in [0, 1], found by bisection; a row is settled once at most one weight is between its bounds.
    Counts are float32, which is exact up to 2**24 tokens, so that one message carries them and the sums to all ranks.
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
        count_B, sum_B = vocab_ranks.sum(jnp.stack(kept_B2))
        ok_B = enough(count_B, sum_B)
        return (
            jnp.where(ok_B, middle_B, low_B),
            jnp.where(ok_B, high_B, middle_B),
            jnp.where(ok_B, count_B, count_low_B),
            jnp.where(ok_B, count_high_B, count_B),
        )

    shape = weights_BV.shape[:1]
    everything = jnp.full(shape, weights_BV.shape[1] * vocab_ranks.count, jnp.float32)
    start = (least_B, jnp.full(shape, _ONE_BITS + 1, jnp.int32), everything, jnp.zeros(shape, jnp.float32))
    return jnp.where(unlimited_B, least_B, jax.lax.while_loop(unsettled, halve, start)[0])


def draw(
    log_weights_BV: Float32[Array, "B V"], rows: SamplingRows, position_B: Int32[Array, "B"], purpose: Purpose, vocab_ranks: Ranks = ONE
) -> Int32[Array, "B"]:
    """Draw a token with a probability proportional to its weight; weights of -inf are never drawn.

    Gumbel-max: the token with the highest sum of log-weight and noise, the lower one of equal sums. The noise is keyed by (seed, position,
    token), so every sharding draws the same token, and rounding changes it only where the two highest sums nearly tie. At
    temperature 0 there is no noise, and the highest weight wins.
    """
    V = log_weights_BV.shape[1]
    token_V = vocab_ranks.index() * V + jnp.arange(V, dtype=jnp.int32)
    noise_BV = gumbel(stream_keys(rows.seed_B2, position_B, purpose), token_V)
    return highest_token(log_weights_BV + jnp.where(rows.temperature_B[:, None] > 0, noise_BV, 0.0), vocab_ranks)[1]


def _pick(values_BV: Array, index_B: Array) -> Array:
    return jnp.take_along_axis(values_BV, index_B[:, None], axis=1)[:, 0]


def empty_logprobs(leading: tuple[int, ...], vocab_size: int) -> Logprobs:
    """Zeros shaped like the log-probabilities of ``leading`` tokens."""
    top = (*leading, min(MAX_LOGPROBS, vocab_size))
    return Logprobs(jnp.zeros(leading, jnp.float32), jnp.zeros(top, jnp.float32), jnp.zeros(top, jnp.int32))


def token_logprobs(
    logits_BV: Float32[Array, "B V"], token_B: Int32[Array, "B"], wanted: Bool[Array, ""], vocab_ranks: Ranks = ONE
) -> Logprobs:
    """Log-probabilities of these tokens and of the likeliest ones; zeros unless they are ``wanted``."""
    B, V = logits_BV.shape

    def reported(logits_BV: Array) -> Logprobs:
        logprobs_BV = log_probabilities(logits_BV, vocab_ranks)
        index_B = local_index(token_B, V, vocab_ranks)
        chosen_B = vocab_ranks.sum(jnp.where(index_B < V, _pick(logprobs_BV, jnp.minimum(index_B, V - 1)), 0.0))
        return Logprobs(chosen_B, *highest_tokens(logprobs_BV, min(MAX_LOGPROBS, V * vocab_ranks.count), vocab_ranks))

    nothing = empty_logprobs((B,), V * vocab_ranks.count)
    return jax.lax.cond(wanted, reported, lambda _: nothing, logits_BV)


def log_probabilities(logits_BV: Float32[Array, "B V"], vocab_ranks: Ranks = ONE) -> Float32[Array, "B V"]:
    """The log-softmax."""
    shifted_BV = logits_BV - _highest(logits_BV, vocab_ranks)[:, None]
    return shifted_BV - jnp.log(vocab_ranks.sum(jnp.sum(jnp.exp(shifted_BV), axis=-1, keepdims=True)))


def highest_tokens(
    values_BV: Float32[Array, "B V"], count: int, vocab_ranks: Ranks = ONE
) -> tuple[Float32[Array, "B j"], Int32[Array, "B j"]]:
    """The ``count`` highest values of each row and their tokens, highest first; of equal ones the lower token comes first."""
    V = values_BV.shape[1]
    # The highest values of all are among each rank's highest.
    top_Bj, top_id_Bj = jax.lax.top_k(values_BV, min(count, V))
    if vocab_ranks.count == 1:
        return top_Bj, top_id_Bj.astype(jnp.int32)

    def of_all_ranks(own_Bj: Array) -> Array:
        """As a sum in which every rank has its own columns: on GPUs sums are kernels that CUDA graphs take in, gathers are not."""
        B, j = own_Bj.shape
        columns_Bf = jnp.zeros((B, vocab_ranks.count * j), own_Bj.dtype)
        return vocab_ranks.sum(jax.lax.dynamic_update_slice_in_dim(columns_Bf, own_Bj, vocab_ranks.index() * j, axis=1))

    top_id_Bj = of_all_ranks(top_id_Bj.astype(jnp.int32) + vocab_ranks.index() * V)
    top_Bj = of_all_ranks(top_Bj)
    top_Bj, place_Bj = jax.lax.top_k(top_Bj, count)
    return top_Bj, jnp.take_along_axis(top_id_Bj, place_Bj, axis=1)

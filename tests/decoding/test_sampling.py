"""The sampler against sorted float64 references, and what its randomness depends on."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4jax.decoding.params import SamplingParams
from l4jax.decoding.sampling import (
    TokenCounts,
    adjust_logits,
    batch_features,
    draw,
    sample,
    sampling_rows,
    truncated_weights,
    uniform,
)


def rows_of(*params, vocab=50, seeds=None):
    return sampling_rows(params, seeds or [0] * len(params), [[]] * len(params), vocab)


def reference_probabilities(logits, params):
    """Temperature, min-p, top-k, top-p by sorting, in float64; tokens that tie at a cut are kept."""
    scaled = logits.astype(np.float64) / params.temperature
    p = np.exp(scaled - scaled.max())
    p[p < params.min_p] = 0
    if params.top_k:
        p[p < np.sort(p)[::-1][min(params.top_k, len(p)) - 1]] = 0
    p /= p.sum()
    if params.top_p < 1:
        descending = np.sort(p)[::-1]
        p[p < descending[np.searchsorted(np.cumsum(descending), params.top_p)]] = 0
    return p / p.sum()


settings_of = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 60),
    top_p=st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.lists(settings_of, min_size=2, max_size=2))
def test_truncation_equals_the_sorted_reference(seed, params):
    # Logits a hundredth apart at least: no two probabilities are within rounding of each other or of a cut.
    rng = np.random.default_rng(seed)
    logits = np.stack([rng.permutation(50) for _ in params]).astype(np.float32) / 7 + np.float32(0.003)
    weights = np.asarray(truncated_weights(jnp.asarray(logits), rows_of(*params), logits.max(-1)), np.float64)
    for row, p in enumerate(params):
        expected = reference_probabilities(logits[row], p)
        got = weights[row] / weights[row].sum()
        boundary = reference_probabilities(logits[row], SamplingParams(**{**vars(p), "top_p": min(1.0, p.top_p * (1 + 1e-5))}))
        if ((got > 0) == (boundary > 0)).all():  # a cumulative sum that meets top_p to within float32 rounding
            expected = boundary
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-7)


def test_ties_at_the_cut_are_kept():
    logits = jnp.array([[1.0, 3.0, 2.0, 2.0]])
    kept = np.asarray(truncated_weights(logits, rows_of(SamplingParams(top_k=2), vocab=4), jnp.array([3.0])))[0] > 0
    assert kept.tolist() == [False, True, True, True]


def test_top_k_of_one_is_greedy_whatever_the_number():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 50)), jnp.float32)
    params = [SamplingParams(temperature=5.0, top_k=1)] * 64
    token, _ = sample(logits, rows_of(*params, seeds=list(range(64))), None, jnp.zeros(64, jnp.int32), batch_features(params))
    np.testing.assert_array_equal(token, np.argmax(logits, axis=-1))


def test_penalties_and_bias_follow_their_formulas():
    logits = np.array([[2.0, -2.0, 1.0, 0.5, -1.0, 3.0]], np.float32)
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={4: 1.5, 5: -float("inf")})
    counts = TokenCounts(jnp.array([[True, True, False, False, False, False]]), jnp.array([[0, 0, 3, 0, 1, 0]], jnp.int32))
    # Tokens 0 and 1 only in the prompt: repetition. 2 three times in the output: all three. 4: bias first, then as 2.
    expected = [1.0, -4.0, 1.0 / 2 - 0.25 - 1.5, 0.5, 0.5 / 2 - 0.25 - 0.5, -np.inf]
    np.testing.assert_allclose(adjust_logits(jnp.asarray(logits), rows_of(params, vocab=6), counts)[0], expected, rtol=1e-6)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 128, 129, 700]), st.floats(0.0, 1.0))
def test_draw_inverts_the_cumulative_distribution_and_never_picks_a_zero(seed, vocab, sparsity):
    rng = np.random.default_rng(seed)
    weights = rng.random((8, vocab)).astype(np.float32) * (rng.random((8, vocab)) >= sparsity)
    weights[np.arange(8), rng.integers(0, vocab, 8)] = 0.7
    numbers = np.concatenate([[0.0, 1 - 2**-24], rng.random(6)]).astype(np.float32)
    token = np.asarray(draw(jnp.asarray(weights), jnp.asarray(numbers)))
    for row, t in enumerate(token):
        assert weights[row, t] > 0
        cumulative = np.cumsum(weights[row].astype(np.float64))
        target = numbers[row] * cumulative[-1]
        slack = 1e-5 * cumulative[-1]
        assert cumulative[t] + slack >= target >= cumulative[t] - weights[row, t] - slack


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),
        ({"temperature": 0.5}, [64 / 86, 16 / 86, 4 / 86, 1 / 86, 1 / 86]),
        ({"temperature": 2.0, "top_k": 3}, [2 / (3 + 2**0.5), 2**0.5 / (3 + 2**0.5), 1 / (3 + 2**0.5), 0, 0]),
        ({"top_p": 0.8, "min_p": 0.2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.9, "min_p": 0.2}, [4 / 7, 2 / 7, 1 / 7, 0, 0]),
    ],
)
def test_draws_have_the_right_frequencies(settings, expected):
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32))
    params = [SamplingParams(**settings)] * 20000
    token, _ = sample(
        jnp.tile(logits, (20000, 1)),
        rows_of(*params, vocab=5, seeds=range(20000)),
        None,
        jnp.zeros(20000, jnp.int32),
        batch_features(params),
    )
    counts = collections.Counter(np.asarray(token).tolist())
    assert sum(expected) == pytest.approx(1)
    assert {i for i in counts if expected[i] == 0} == set()
    chi_square = sum((counts[i] - 20000 * p) ** 2 / (20000 * p) for i, p in enumerate(expected) if p > 0)
    assert chi_square < 37.3  # 4 degrees of freedom: exceeded once in 6 million; the seeds are fixed


def test_randomness_depends_on_seed_and_position_alone():
    keys = rows_of(*[SamplingParams()] * 4, seeds=[7, 7, 2**40 + 7, 8]).key_B2
    first = np.asarray(uniform(keys, jnp.array([3, 3, 3, 3], jnp.int32)))
    later = np.asarray(uniform(keys[1:2], jnp.array([4], jnp.int32)))
    assert first[0] == first[1]
    assert len({first[0], first[2], first[3], later[0]}) == 4
    assert np.asarray(uniform(keys[:1], jnp.array([3], jnp.int32)))[0] == first[0]


def test_logprobs_are_of_the_model_before_any_processor():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 50)), jnp.float32)
    params = [SamplingParams(temperature=0.5, top_k=1, logit_bias={3: 50.0}, logprobs=4)]
    counts = TokenCounts(jnp.zeros((1, 50), bool), jnp.zeros((1, 50), jnp.int32))
    token, logprobs = sample(logits, rows_of(*params), counts, jnp.zeros(1, jnp.int32), batch_features(params))
    expected = np.asarray(jax.nn.log_softmax(logits))[0]
    assert int(token[0]) == 3 and logprobs is not None
    np.testing.assert_allclose(logprobs.chosen_B[0], expected[3], rtol=1e-6)
    np.testing.assert_array_equal(logprobs.top_id_Bj[0, :4], np.argsort(-expected)[:4])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {1: float("nan")}),
        ("stop", [""]),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", 21),
        ("max_tokens", None),
        ("max_tokens", True),
        ("temperature", "hot"),
        ("temperature", 1e300),
        ("top_k", 2**40),
        ("top_p", None),
        ("repetition_penalty", 1e-50),
        ("frequency_penalty", "much"),
        ("logit_bias", [(1, 2.0)]),
        ("logit_bias", {1: float("inf")}),
        ("logit_bias", {"a": 1.0}),
        ("stop", 3),
        ("stop_token_ids", 3),
        ("stop_token_ids", ["a"]),
    ],
)
def test_a_bad_value_is_named_in_one_line(field, value):
    with pytest.raises(ValueError, match=rf"^{field} is .*; expected .*$"):
        SamplingParams(**{field: value})


def test_numbers_may_be_numpys():
    params = SamplingParams(
        max_tokens=np.int64(3), temperature=np.float32(0.5), top_k=np.int32(2), seed=np.uint64(2**63), stop_token_ids=np.array([1, 2])
    )
    assert params.max_tokens == 3

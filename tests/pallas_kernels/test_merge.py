"""Partial attentions merge to the attention over all keys, by every implementation."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.merge import merge_attention, reference

IMPLEMENTATIONS = {"reference": jax.jit(reference.merge_attention), "xla": jax.jit(merge_attention)}


def softmax_attention(scores, values):
    """(out, lse) in float64; no keys give values that mean nothing, and -inf."""
    if not len(scores):
        return np.full(values.shape[1], 1e6), -np.inf
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum(), np.log(weights.sum()) + scores.max()


def merged(name, partials, dtype):
    return IMPLEMENTATIONS[name]([(np.asarray(out, dtype)[None], np.asarray(lse, dtype)[None]) for out, lse in partials])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_merge_equals_attention_over_the_union(name, seed, sizes):
    rng = np.random.default_rng(seed)
    scores = [rng.normal(scale=10, size=n) for n in sizes]
    values = [rng.normal(size=(n, 3)) for n in sizes]
    out, lse = merged(name, [softmax_attention(s, v) for s, v in zip(scores, values, strict=True)], np.float32)
    expected_out, expected_lse = softmax_attention(np.concatenate(scores), np.concatenate(values))
    # Scores of up to about 40 carry float32 rounding of 4e-6 into the exponent.
    np.testing.assert_allclose(out[0], expected_out if any(sizes) else 0.0, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse[0], expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("height", [1e4, -1e4, 1e30])
def test_high_and_low_scores_do_not_overflow(name, height):
    """Of two equal ones the mean, a much lower one left out, an empty one too."""
    out, lse = merged(name, [([1.0], height), ([3.0], height), ([9.0], height - abs(height)), ([9.0], -np.inf)], np.float32)
    np.testing.assert_allclose(out[0], [2.0], rtol=1e-6)
    np.testing.assert_allclose(lse[0], height + np.log(2), rtol=1e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_float64_is_kept(name):
    with jax.enable_x64(True):
        out, lse = merged(name, [([1.0], 0.1), ([2.0], 0.3)], np.float64)
        assert out.dtype == lse.dtype == np.float64
        weights = np.exp([0.1, 0.3])
        np.testing.assert_allclose(out[0, 0], weights @ [1.0, 2.0] / weights.sum(), rtol=1e-14)
        np.testing.assert_allclose(lse[0], np.log(weights.sum()), rtol=1e-14)

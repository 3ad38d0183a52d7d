"""Partial attentions merge to the attention over all keys."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.merge import merge_attention


def softmax_attention(scores, values):
    """(out, lse) in float64; no keys give zeros and -inf."""
    if not len(scores):
        return np.zeros(values.shape[1]), -np.inf
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum(), np.log(weights.sum()) + scores.max()


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_merge_equals_attention_over_the_union(seed, sizes):
    rng = np.random.default_rng(seed)
    scores = [rng.normal(scale=10, size=n) for n in sizes]
    values = [rng.normal(size=(n, 3)) for n in sizes]
    partials = [softmax_attention(s, v) for s, v in zip(scores, values, strict=True)]
    out, lse = merge_attention([(np.float32(o)[None], np.float32(e)[None]) for o, e in partials])
    expected_out, expected_lse = softmax_attention(np.concatenate(scores), np.concatenate(values))
    # Scores of up to about 40 carry float32 rounding of 4e-6 into the exponent.
    np.testing.assert_allclose(out[0], expected_out, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse[0], expected_lse, rtol=1e-6, atol=1e-6)

"""Partial attentions merge to the attention over all keys, and splits as partial attentions do, by every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.merge import IMPLEMENTATIONS as OF_SPLITS
from pallas_kernels.merge import merge_attention, merge_splits, reference
from pallas_kernels.merge.cost import merge_splits_cost
from tests.pallas_kernels.programs import AN_H100, on_one_cpu
from tests.pallas_kernels.simulator import simulated

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


def splits_of(B, K, splits, N, G, h=128):
    """Outputs and log-sum-exps, of which some splits, and all of query row 0, have no keys; and rows after the last, which are NaN."""
    rows = -(-N * G // 8) * 8
    rng = np.random.default_rng(splits)
    out, lse = rng.normal(size=(B, K, splits, rows, h)), rng.normal(scale=30, size=(B, K, splits, rows))
    empty = rng.random(lse.shape) < 0.3
    empty[..., 0] = True
    out, lse = np.where(empty[..., None], 0, out), np.where(empty, -np.inf, lse)
    out[..., N * G :, :] = lse[..., N * G :] = np.nan
    return jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32)


# One split; fewer than a turn of the loop adds; a turn and some; several turns. Rows in one and in several copies of eight.
@pytest.mark.parametrize(("B", "K", "splits", "N", "G"), [(1, 1, 1, 1, 1), (2, 2, 3, 1, 4), (1, 1, 19, 3, 5), (1, 2, 16, 2, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OF_SPLITS)
def test_splits_merge_as_partial_attentions_do(name, dtype, B, K, splits, N, G):
    out, lse = splits_of(B, K, splits, N, G)

    def run(out, lse):
        return merge_splits(out, lse, N, G, dtype, implementation=name)

    if name == "hopper":
        (found, found_lse), copied = simulated(run, out, lse)
        assert copied == merge_splits_cost(B, K, splits, N * G, 128, found.dtype.itemsize).copied_bytes
    else:
        found, found_lse = on_one_cpu(run)(out, lse)
    assert found.dtype == dtype
    expected, expected_lse = reference.merge_attention([(out[:, :, z, : N * G], lse[:, :, z, : N * G]) for z in range(splits)])
    order = jnp.arange(N * G).reshape(N, G)
    # Exponents of up to some hundred, in base 2, are rounded to float32; then the output to its dtype.
    tolerance = 2e-5 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(np.asarray(found, np.float32), jnp.moveaxis(expected[:, :, order], 1, 2), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found_lse, jnp.moveaxis(expected_lse[:, :, order], 1, 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("splits", "h", "rows", "reason"),
    [
        (3, 64, 8, "takes head dimension 128; this one is 64"),
        (257, 128, 8, "takes up to 256 splits; there are 257"),
        (3, 128, 4, "takes rows padded to a multiple of 8; there are 4"),
    ],
)
def test_splits_that_the_kernel_does_not_take_are_refused_with_a_reason(splits, h, rows, reason):
    out, lse = splits_of(1, 1, splits, 1, 4, h)
    with jax.sharding.use_abstract_mesh(AN_H100), pytest.raises(NotImplementedError) as error:
        jax.make_jaxpr(lambda *a: merge_splits(*a, 1, 4, jnp.float32, implementation="hopper"))(out[:, :, :, :rows], lse[..., :rows])
    assert str(error.value) == f"no implementation of merge_splits takes these arguments (hopper: {reason})"


def test_cost_of_merging():
    """Two rows of two heads, three splits, to bfloat16; a block copies the log-sum-exps of eight rows."""
    cost = merge_splits_cost(1, 2, 3, 2, 128, 2)
    assert (cost.flops, cost.least_bytes) == (2 * 4 * 3 * 128, 4 * (3 * 129 * 4 + 256))
    assert cost.copied_bytes == 4 * 3 * (128 + 8) * 4

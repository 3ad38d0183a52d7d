"""Interval attention against float64 attention written out with a boolean mask."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention import attend, attend_pages


def reference(q_BTKGh, k_BSKh, v_BSKh, start_BT, end_BT):
    scores = np.einsum("btkgh,bskh->btkgs", q_BTKGh, k_BSKh, dtype=np.float64)
    key = np.arange(k_BSKh.shape[1])
    visible = (key >= start_BT[..., None]) & (key < end_BT[..., None])
    exponentials = np.where(visible[:, :, None, None], np.exp(scores), 0.0)
    total = exponentials.sum(-1)
    out = np.einsum("btkgs,bskh->btkgh", exponentials, v_BSKh, dtype=np.float64) / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):
        return out, np.log(total)


def problem(seed, B, T, S):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((B, T, 2, 3, 4), (B, S, 2, 4), (B, S, 2, 4)))
    start, end = np.sort(rng.integers(0, S + 1, (2, B, T)), axis=0).astype(np.int32)
    return q, k, v, start, end


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1, 1), (2, 3, 7), (3, 5, 24)]))
def test_attend_equals_masked_softmax(seed, shape):
    args = problem(seed, *shape)
    out, lse = attend(*args, scale=1.0)
    expected_out, expected_lse = reference(*args)
    np.testing.assert_allclose(out, expected_out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1), (2, 3), (3, 5)]))
def test_attend_pages_equals_masked_softmax_whatever_the_page_order(seed, shape):
    q, k, v, start, end = problem(seed, *shape, 24)
    B, _, K, h = k.shape
    page, pages_per_row = 8, 3
    table = np.random.default_rng(seed).permutation(B * pages_per_row + 2)[: B * pages_per_row].reshape(B, pages_per_row).astype(np.int32)
    k_pool, v_pool = np.full((2, B * pages_per_row + 2, K, page, h), 7.0, np.float32)
    for pool, keys in ((k_pool, k), (v_pool, v)):
        pool[table] = keys.reshape(B, pages_per_row, page, K, h).swapaxes(2, 3)
    out, lse = attend_pages(*map(jnp.asarray, (q, k_pool, v_pool, table, start, end)), scale=1.0)
    expected_out, expected_lse = reference(q, k, v, start, end)
    np.testing.assert_allclose(out, expected_out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_pages_past_the_longest_row_are_not_read():
    q, k, v, _, _ = problem(0, 1, 2, 8)
    pool = np.full((3, 2, 8, 4), np.nan, np.float32)
    k_pool, v_pool = pool.copy(), pool.copy()
    k_pool[1], v_pool[1] = k[0].swapaxes(0, 1), v[0].swapaxes(0, 1)
    start, end = np.zeros((1, 2), np.int32), np.array([[8, 3]], np.int32)
    out, _ = attend_pages(*map(jnp.asarray, (q, k_pool, v_pool, np.array([[1, 0, 2]], np.int32), start, end)), scale=1.0)
    np.testing.assert_allclose(out, reference(q, k, v, start, end)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_large_scores_do_not_overflow(scale):
    q, k, v, start, end = problem(1, 1, 2, 5)
    out, lse = attend(q * np.float32(scale), k, v, np.zeros_like(start), np.full_like(end, 5), scale=1.0)
    assert np.isfinite(out).all() and np.isfinite(lse).all()


def test_bfloat16_inputs_give_float32_results():
    q, k, v, start, end = problem(2, 2, 3, 9)
    out, lse = attend(*(jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)), start, end, scale=1.0)
    assert out.dtype == lse.dtype == jnp.float32
    # Inputs and softmax weights carry eight bits: 2**-8 each.
    np.testing.assert_allclose(out, reference(q, k, v, start, end)[0], atol=0.06)

"""Grouped matmul against a float64 loop over groups, and what its compiled program does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import grouped_matmul


def check(sizes, seed=0):
    rng = np.random.default_rng(seed)
    lhs = rng.normal(size=(sum(sizes), 5)).astype(np.float32)
    rhs = rng.normal(size=(len(sizes), 5, 3)).astype(np.float32)
    group = np.repeat(np.arange(len(sizes)), sizes)
    expected = np.einsum("mk,mkn->mn", lhs, rhs[group], dtype=np.float64)
    out = jax.jit(grouped_matmul)(lhs, rhs, np.array(sizes, np.int32))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(st.sampled_from([(1, 1), (9, 3), (70, 6), (200, 2)]), st.integers(0, 2**32 - 1))
def test_equals_a_loop_over_groups(shape, seed):
    rows, groups = shape
    cuts = np.sort(np.random.default_rng(seed).integers(0, rows + 1, groups - 1))
    check(np.diff([0, *cuts, rows]).tolist(), seed)


@pytest.mark.parametrize("sizes", [[300, 0, 0, 0], [0, 0, 0, 300], [0, 1, 298, 1], [128, 128, 0, 44], [1, 0, 0, 0]])
def test_any_imbalance_is_exact(sizes):
    check(sizes)


def test_bfloat16_accumulates_in_float32():
    lhs = jnp.ones((2, 4096), jnp.bfloat16)
    rhs = jnp.full((2, 4096, 1), 1 / 64, jnp.bfloat16)
    out = jax.jit(grouped_matmul)(lhs, rhs, np.array([1, 1], np.int32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 64.0)


@pytest.mark.optimized
def test_no_program_of_dense_size_exists():
    """All experts on all rows would be a [M, G, N] product or a [M, G * K] operand; neither fits in the temporaries."""
    M, G, K, N = 256, 16, 64, 96
    shapes = jax.ShapeDtypeStruct((M, K), jnp.float32), jax.ShapeDtypeStruct((G, K, N), jnp.float32), jax.ShapeDtypeStruct((G,), jnp.int32)
    compiled = jax.jit(grouped_matmul).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < min(M * G * N, M * G * K) * 4 / 2
    block_flops = 2 * 16 * K * N  # sixteen rows a group on average: the block that the loop's body multiplies
    assert compiled.cost_analysis()["flops"] < 4 * block_flops

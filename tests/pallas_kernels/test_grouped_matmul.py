"""Grouped matmul: every implementation against a float64 loop over groups, and what its compiled program does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import gpu, grouped_matmul, reference, xla
from tests.pallas_kernels.programs import AN_H100

IMPLEMENTATIONS = {"reference": reference.grouped_matmul, "xla": xla.grouped_matmul, "all products": gpu.all_products}


@functools.cache
def program(name):
    return jax.jit(IMPLEMENTATIONS[name])


def check(sizes, seed=0, *, after=0, name="xla"):
    """Groups of these sizes, and ``after`` rows of no group."""
    rng = np.random.default_rng(seed)
    lhs = rng.normal(size=(sum(sizes) + after, 5)).astype(np.float32)
    rhs = rng.normal(size=(len(sizes), 5, 3)).astype(np.float32)
    group = np.repeat(np.arange(len(sizes)), sizes)
    expected = np.zeros((len(lhs), 3))
    expected[: sum(sizes)] = np.einsum("mi,mio->mo", lhs[: sum(sizes)], rhs[group], dtype=np.float64)
    out = program(name)(lhs, rhs, np.array(sizes, np.int32))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=40)
@given(shape=st.sampled_from([(1, 1), (9, 3), (70, 6), (200, 2)]), seed=st.integers(0, 2**32 - 1))
def test_equals_a_loop_over_groups(name, shape, seed):
    rows, groups = shape
    cuts = np.sort(np.random.default_rng(seed).integers(0, rows + 1, groups))
    check(np.diff([0, *cuts]).tolist(), seed, after=rows - int(cuts[-1]), name=name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [[300, 0, 0, 0], [0, 0, 0, 300], [0, 1, 298, 1], [128, 128, 0, 44], [1, 0, 0, 0]])
def test_any_imbalance_is_exact(name, sizes):
    check(sizes, name=name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [[0, 0], [1, 0], [0, 5], [3, 9]])
def test_rows_after_the_last_group_are_zeros(name, sizes):
    """Also those that the last group's last block reaches."""
    check(sizes, after=40 - sum(sizes), name=name)


def test_bfloat16_accumulates_in_float32():
    lhs = jnp.ones((2, 4096), jnp.bfloat16)
    rhs = jnp.full((2, 4096, 1), 1 / 64, jnp.bfloat16)
    out = jax.jit(grouped_matmul)(lhs, rhs, np.array([1, 1], np.int32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 64.0)


@pytest.mark.parametrize("name", ["xla", "all products"])
def test_a_matrix_that_is_not_finite_stays_with_its_rows(name):
    rhs = np.ones((3, 4, 2), np.float32)
    rhs[1] = np.nan
    out = program(name)(np.ones((5, 4), np.float32), rhs, np.array([2, 1, 1], np.int32))
    np.testing.assert_array_equal(np.asarray(out)[:, 0], [4, 4, np.nan, 4, 0])


@pytest.mark.parametrize(
    ("rows", "groups", "expected"), [(8, 16, "gpu"), (4, 16, "gpu"), (3, 16, "xla"), (64, 16, "gpu"), (65, 16, "xla"), (8, 128, "xla")]
)
def test_programs_for_gpus_multiply_a_few_rows_at_once(rows, groups, expected):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 8), (groups, 8, 4))]
    arguments.append(jax.ShapeDtypeStruct((groups,), jnp.int32))
    with jax.sharding.use_abstract_mesh(AN_H100):
        functions = {"gpu": gpu.all_products, "xla": xla.grouped_matmul}
        traced = {name: str(jax.make_jaxpr(function)(*arguments)) for name, function in functions.items()}
        assert str(jax.make_jaxpr(grouped_matmul)(*arguments)) == traced[expected]
    with pytest.raises(NotImplementedError, match=r"^written for [CG]PUs; the(re is no mesh| program is for [CG]PUs)"):
        jax.make_jaxpr(gpu.grouped_matmul)(*arguments)


@pytest.mark.optimized
def test_no_program_of_dense_size_exists():
    """All experts on all rows would be a [M, E, o] product or a [M, E * i] operand; neither fits in the temporaries."""
    M, E, i, o = 256, 16, 64, 96
    shapes = jax.ShapeDtypeStruct((M, i), jnp.float32), jax.ShapeDtypeStruct((E, i, o), jnp.float32), jax.ShapeDtypeStruct((E,), jnp.int32)
    compiled = jax.jit(grouped_matmul).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < min(M * E * o, M * E * i) * 4 / 2
    block_flops = 2 * 16 * i * o  # sixteen rows a group on average: the block that the loop's body multiplies
    assert compiled.cost_analysis()["flops"] < 4 * block_flops

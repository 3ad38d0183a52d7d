"""The residual's sum and its norm: every implementation against the reference, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.norm import IMPLEMENTATIONS, add_norm, reference
from pallas_kernels.norm.cost import add_norm_cost
from tests.pallas_kernels.programs import AN_H100, on_one_cpu
from tests.pallas_kernels.simulator import simulated

EPS = 1e-2


def arguments(rows, D, dtype):
    rng = np.random.default_rng(D)
    return tuple(jnp.asarray(rng.normal(size=size), dtype) for size in ((rows, 1, D), (rows, 1, D), D))


def run(name, function, *given):
    return simulated(function, *given)[0] if name == "hopper" else on_one_cpu(function)(*given)


# One part; a part and a shorter one; four.
@pytest.mark.parametrize(("rows", "D"), [(3, 256), (1, 5120), (2, 16384)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_sum_and_its_norm_equal_float64_but_for_rounding(name, dtype, rows, D):
    given = arguments(rows, D, dtype)
    total, normed = run(name, lambda *a: add_norm(*a, eps=EPS, implementation=name), *given)
    assert total.dtype == normed.dtype == dtype
    np.testing.assert_array_equal(total, given[0] + given[1])
    _, expected = reference.add_norm(total, np.zeros_like(total), given[2], EPS)
    # The norm is rounded, and its product with the scale. XLA may fuse the two and normalise the sum unrounded.
    tolerance = 3.1 * {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    np.testing.assert_allclose(np.asarray(normed, np.float64), expected, rtol=tolerance, atol=tolerance**2)
    exact, _ = reference.add_norm(*given, EPS)
    np.testing.assert_allclose(np.asarray(total, np.float64), exact, rtol=tolerance, atol=tolerance)


def test_gradients_on_gpus_are_those_of_xla():
    given = arguments(2, 256, "bfloat16")

    def loss(name, *given):
        return sum(jnp.sum(result.astype(jnp.float32)) for result in add_norm(*given, eps=EPS, implementation=name))

    def gradients(name):
        return run(name, jax.grad(lambda *given: loss(name, *given), argnums=(0, 1, 2)), *given)

    for found, expected in zip(gradients("hopper"), gradients("xla"), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("rows", "D", "dtype", "reason"),
    [
        (2, 256, "float32", "takes bfloat16 or float16, the same for all arrays; they are float32"),
        (257, 256, "bfloat16", "takes up to 256 rows; there are 257"),
        *((2, D, "bfloat16", f"takes rows of a multiple of 128 numbers, up to 16384; they have {D}") for D in (576, 32768)),
    ],
)
def test_what_the_kernel_does_not_take_is_said(rows, D, dtype, reason):
    with jax.sharding.use_abstract_mesh(AN_H100), pytest.raises(NotImplementedError) as error:
        jax.make_jaxpr(lambda *a: add_norm(*a, eps=EPS, implementation="hopper"))(*arguments(rows, D, dtype))
    assert str(error.value) == f"no implementation of add_norm takes these arguments (hopper: {reason})"


def test_cost_of_two_rows():
    """Two arrays of rows in and two out, and the scales; the kernel loads them without copies to shared memory."""
    cost = add_norm_cost(2, 256)
    assert (cost.flops, cost.least_bytes, cost.copied_bytes) == (6 * 512, 2 * (4 * 512 + 256), 0)
    assert simulated(lambda *a: add_norm(*a, eps=EPS, implementation="hopper"), *arguments(2, 256, "bfloat16"))[1] == 0

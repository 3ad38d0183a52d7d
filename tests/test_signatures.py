"""The signatures of all three packages that name arrays are checked while the tests run."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from l4jax.decoding.verify import without
from pallas_kernels.matmul import matmul
from sharding.ring import attend_positions

CALLS = {
    "l4jax": (lambda n, dtype: without(zeros(2, 4), zeros(n, dtype=dtype)), 2, jnp.int32),
    "sharding": (
        lambda n, dtype: attend_positions(
            zeros(1, 2, 1, 1, 4), zeros(2, 1, 3, 1, 4), zeros(1, 2, dtype=jnp.int32), zeros(1, n, dtype=dtype), scale=1.0
        ),
        3,
        jnp.int32,
    ),
    "pallas_kernels": (lambda n, dtype: matmul(zeros(2, 4), zeros(3, n, dtype=dtype)), 4, jnp.float32),
}
"""Of each package a call that takes a dimension and a type, and those that it is to have."""


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(("call", "dimension", "dtype"), CALLS.values(), ids=CALLS.keys())
def test_a_wrong_dimension_and_a_wrong_type_raise(call, dimension, dtype):
    call(dimension, dtype)
    for wrong in ((dimension + 1, dtype), (dimension, jnp.int8)):
        with pytest.raises(TypeCheckError):
            call(*wrong)

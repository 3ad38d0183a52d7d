"""Products with weight matrices: every implementation against the reference, and the reference against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import cpu, matmul, reference, xla
from tests.pallas_kernels.programs import on_one_cpu

# [out, in] of real models, with fewer outputs; and input widths that loops over whole registers do not divide.
WEIGHTS = {
    "SmolLM2, query, key and value": (96, 576),
    "SmolLM2, down": (64, 1536),
    "Llama 3.1 8B": (48, 4096),
    "Llama 3.1 8B, down": (24, 14336),
    "Scout, tensor=8": (40, 1024),
    "37 registers": (24, 592),
    "no whole register": (24, 40),
    "one output": (1, 64),
}
FLOAT32 = jnp.dtype(jnp.float32)


def problem(shape, weight, dtype):
    rng = np.random.default_rng(sum(shape) + sum(weight))
    return (rng.normal(size=s).astype(dtype) for s in ((*shape, weight[1]), weight))


def exact(x_Bi, weight_oi):
    return np.asarray(x_Bi).astype(np.float64) @ np.asarray(weight_oi).astype(np.float64).T


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1), (2, 4), (17, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_reference(weight, shape, dtype):
    x, w = problem(shape, weight, jnp.dtype(dtype))
    expected = exact(x, w)
    # A sum's rounding grows with its terms, not with what they cancel to.
    sums = 2.0**-23 * np.sqrt(weight[1]) * np.sqrt(exact(x * x, w * w).max())
    for function in (matmul, reference.matmul, xla.matmul):
        own, wide = on_one_cpu(lambda x, w, f=function: (f(x, w), f(x, w, dtype=FLOAT32)))(x, w)
        assert own.shape == wide.shape == (*shape, weight[0]) and own.dtype == jnp.dtype(dtype) and wide.dtype == jnp.float32
        np.testing.assert_allclose(wide, expected, rtol=0, atol=8 * sums)
        half_ulp = 2.0**-8 * np.abs(expected) if dtype == "bfloat16" else 0.0
        assert (np.abs(np.asarray(own).astype(np.float64) - expected) <= 8 * sums + 1.01 * half_ulp).all()


def test_float64_is_kept():
    with jax.enable_x64(True):
        x, w = problem((2,), (24, 40), np.float64)
        for function in (matmul, reference.matmul, xla.matmul):
            found = on_one_cpu(function)(x, w)
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, exact(x, w), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_number_that_is_not_finite_stays_in_its_output(value, dtype):
    """And infinity keeps its sign: no implementation multiplies it with a padding's zero."""
    x, w = problem((1,), (32, 576), jnp.dtype(dtype))
    w[5, 570], x[0, 570] = value, 1
    found = np.asarray(on_one_cpu(matmul)(x, w), np.float32)
    assert (np.isnan if np.isnan(value) else np.isposinf)(found[0, 5]) and np.isfinite(np.delete(found, 5)).all()


@pytest.mark.parametrize(
    ("rows", "dtype", "supported"),
    [
        (1, "bfloat16", True),
        (2, "bfloat16", False),
        (1, "float32", True),
        (2, "float32", True),
        (16, "float32", True),
        (17, "float32", False),
    ],
)
def test_what_has_a_kernel_for_cpus(rows, dtype, supported):
    x, w = problem((rows,), (32, 576), jnp.dtype(dtype))
    lowered = on_one_cpu(matmul).lower(x, w).as_text()
    if supported:
        assert lowered == on_one_cpu(cpu.matmul).lower(x, w).as_text() != on_one_cpu(xla.matmul).lower(x, w).as_text()
    else:
        with pytest.raises(NotImplementedError, match=f"{rows} rows of {dtype}"):
            on_one_cpu(cpu.matmul).lower(x, w)
        assert lowered == on_one_cpu(xla.matmul).lower(x, w).as_text()


def test_programs_for_other_devices_have_xlas_product():
    x, w = problem((1,), (32, 576), jnp.dtype(jnp.bfloat16))
    assert str(jax.make_jaxpr(matmul)(x, w)) == str(jax.make_jaxpr(xla.matmul)(x, w))
    with pytest.raises(NotImplementedError, match=r"^written for [CG]PUs; the(re is no mesh| program is for [CG]PUs)"):
        cpu.matmul(x, w)

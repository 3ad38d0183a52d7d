"""What must be computed in float32 whatever the weights' dtype: each op on bfloat16 inputs against float64 on the same inputs.

A result that is rounded to bfloat16 once is within half a unit in the last place, 2**-8 of its size. Where XLA's CPU backend would hide
the mistake, by accumulating in float32 unasked, the types in the traced program are looked at.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from l4jax.config import MoEConfig
from l4jax.model.feed_forward import MixtureOfExperts
from l4jax.model.llama import Llama
from l4jax.model.rotary import rotary_angles
from l4jax.model.weights import BoundModel, weight_specs
from pallas_kernels.experts.grouped import grouped_matmul
from pallas_kernels.flash_attention import attend_pages
from pallas_kernels.flash_attention.xla import attend
from pallas_kernels.heads.xla import rotate
from pallas_kernels.keys import Interval, PagedKeys
from pallas_kernels.norm import rms_normalize
from sharding.mesh import ONE_DEVICE
from tests.tiny import scout_like, weights

HALF_ULP = 2.0**-8 * 1.01
RNG = np.random.default_rng(0)


def bfloat16(*shape):
    return RNG.normal(size=shape).astype(ml_dtypes.bfloat16)


def exact(array):
    return np.asarray(array).astype(np.float64)


def dot_types(function, *arguments):
    """Result types of the matrix products in the traced program, those in loops included."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation.outvars[0].aval.dtype
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    if hasattr(inner, "jaxpr"):
                        yield from walk(inner.jaxpr)
                    elif hasattr(inner, "eqns"):
                        yield from walk(inner)

    return list(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


def test_rms_norm():
    x = bfloat16(64, 128)
    expected = exact(x) / np.sqrt((exact(x) ** 2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(exact(rms_normalize(x, 1e-5)), expected, rtol=HALF_ULP)


def test_rotation():
    config = scout_like(head_dim=64)
    position = np.arange(40, dtype=np.int32)[None]
    x = bfloat16(1, 40, 2, 3, 64)
    cos, sin = (exact(a)[:, :, None, None] for a in rotary_angles(config, position))
    even, odd = exact(x)[..., ::2], exact(x)[..., 1::2]
    expected = np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)
    np.testing.assert_allclose(exact(rotate(x, rotary_angles(config, position))), expected, rtol=HALF_ULP, atol=1e-6)


@pytest.mark.parametrize("paged", [False, True])
def test_attention_scores(paged):
    """Of a large head, so that scores are large: rounded to bfloat16 they would be off by a hundredth."""
    q, k, v = 3 * bfloat16(1, 5, 2, 3, 128), 3 * bfloat16(1, 16, 2, 128), bfloat16(1, 16, 2, 128)
    start, end = np.zeros((1, 5), np.int32), np.full((1, 5), 16, np.int32)
    if paged:
        pools = (jnp.asarray(np.swapaxes(a, 1, 2)) for a in (k, v))
        out, lse = attend_pages(q, PagedKeys(*pools, np.zeros((1, 1), np.int32), Interval(start, end)), scale=0.11)
    else:
        out, lse = attend(q, k, v, start, end, scale=0.11)
    scores = 0.11 * np.einsum("btkgh,bskh->btkgs", exact(q), exact(k))
    highest = scores.max(-1, keepdims=True)
    total = np.exp(scores - highest).sum(-1)
    assert out.dtype == lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, np.log(total) + highest[..., 0], rtol=1e-5)
    # The products with the values have bfloat16 probabilities.
    expected = np.einsum("btkgs,bskh->btkgh", np.exp(scores - highest) / total[..., None], exact(v))
    np.testing.assert_allclose(out, expected, atol=2.0**-8 * np.abs(exact(v)).max())


def test_scores_far_into_the_context_are_those_at_its_beginning():
    """Llama 4's rotation is within a chunk: at ten million tokens float32 angles from the beginning would be off by half a radian."""
    config = scout_like(attention_chunk_size=8192, max_position_embeddings=10485760, rope_scaling=None, rope_theta=500000.0, head_dim=64)
    early = np.array([[5, 100, 4000, 8191]], np.int32)
    q, k = (RNG.normal(size=(1, 4, 1, 1, 64)).astype(np.float32) for _ in range(2))
    scores = []
    for position in (early, early + 1279 * 8192):
        angles = rotary_angles(config, position)
        scores.append(np.einsum("btkgh,bskgh->ts", rotate(q, angles), rotate(k, angles)))
    np.testing.assert_array_equal(*scores)
    # Against float64 throughout.
    frequency = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    pairs = [np.asarray(a, np.float64)[0, :, 0, 0].reshape(4, 32, 2) @ [1, 1j] * np.exp(1j * early[0][:, None] * frequency) for a in (q, k)]
    expected = np.einsum("ti,si->ts", pairs[0], pairs[1].conj()).real
    np.testing.assert_allclose(scores[1], expected, atol=5e-3)


def test_logits():
    config = scout_like(vocab_size=200)
    values = weights(config, dtype=jnp.dtype(jnp.bfloat16))
    bound, x = BoundModel(Llama(config)), bfloat16(3, config.hidden_size)
    got = bound.bind(bound.leaves(values)).logits(x)
    assert got.dtype == jnp.float32
    expected = exact(x) @ exact(values["head"]).T
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_grouped_matmul_accumulates_in_float32():
    sizes = np.array([3, 0, 5, 2], np.int32)
    assert set(dot_types(grouped_matmul, bfloat16(10, 16), bfloat16(4, 8, 16), sizes)) == {jnp.dtype(jnp.float32)}


def test_the_router_scores_in_float32():
    bound = BoundModel(MixtureOfExperts(16, MoEConfig(num_experts=4, intermediate_size=24, moe_layers=(True,)), ONE_DEVICE))
    specs = weight_specs(MixtureOfExperts(16, MoEConfig(num_experts=4, intermediate_size=24, moe_layers=(True,)), ONE_DEVICE))
    leaves = bound.leaves({name: bfloat16(*spec.shape) for name, spec in specs.items()})
    assert dot_types(lambda x: bound.bind(leaves)._route(x)[0], bfloat16(6, 16)) == [jnp.dtype(jnp.float32)]

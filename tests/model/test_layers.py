"""Norm, rotation, temperature and experts against equations written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.cache import CacheShape
from l4jax.config import MoEConfig, RopeScaling
from l4jax.model.attention import Attention
from l4jax.model.feed_forward import MixtureOfExperts
from l4jax.model.rotary import rotary_angles, rotary_frequencies
from l4jax.model.steps.inputs import attention_temperature
from l4jax.model.steps.replicated import replicated_step
from l4jax.model.weights import BoundModel, random_weights
from pallas_kernels.heads.xla import rotate
from pallas_kernels.norm import rms_normalize
from sharding.mesh import ONE_DEVICE
from tests.tiny import empty_cache, scout_like


def test_rms_norm_divides_by_the_mean_not_the_sum():
    x = np.array([[3.0, 4.0]], np.float32)
    np.testing.assert_allclose(rms_normalize(x, 0.0), x / np.sqrt(12.5), rtol=1e-6)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    x = jnp.full((1, 4096), 1.0 + 2**-7, jnp.bfloat16)
    assert rms_normalize(x, 0.0).dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(rms_normalize(x, 0.0), np.float32), 1.0)


def test_rotation_turns_interleaved_pairs_as_complex_numbers():
    config = scout_like(rope_scaling=None, attention_chunk_size=256)
    position = np.array([[0, 1, 200]], np.int32)
    x = np.random.default_rng(0).normal(size=(1, 3, 1, 1, 8)).astype(np.float32)
    frequency = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    turned = x.astype(np.float64).view(np.complex128) * np.exp(1j * position[0][None, :, None, None, None] * frequency)
    np.testing.assert_allclose(rotate(x, rotary_angles(config, position)), turned.view(np.float64), rtol=1e-4, atol=1e-4)


def test_scout_scaling_divides_exactly_the_last_29_of_64_frequencies():
    plain = rotary_frequencies(128, 500000.0, None)
    scaling = RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=8192)
    scaled = rotary_frequencies(128, 500000.0, scaling)
    np.testing.assert_array_equal(scaled[:35], plain[:35])
    np.testing.assert_allclose(scaled[35:], plain[35:] / 16, rtol=1e-6)


def test_llama3_scaling_blends_between_its_bounds():
    plain = rotary_frequencies(128, 500000.0, None).astype(np.float64)
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    wavelength = 2 * np.pi / plain
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    expected = (1 - smooth) * plain / 8 + smooth * plain
    np.testing.assert_allclose(rotary_frequencies(128, 500000.0, scaling), expected, rtol=1e-6)
    assert ((smooth > 0) & (smooth < 1)).any()


@pytest.mark.parametrize(
    ("position", "scale"),
    [(0, 1.0), (8190, 1.0), (8191, 1.0 + 0.1 * np.log(2)), (131071, 1.0 + 0.1 * np.log(17)), (10485759, 1.0 + 0.1 * np.log(1281))],
)
def test_attention_temperature_at_bucket_edges(position, scale):
    config = scout_like(floor_scale=8192)
    np.testing.assert_allclose(attention_temperature(config, jnp.array([[position]], jnp.int32))[0, 0], scale, rtol=1e-6)


def attention_reference(config, weights, x):
    """A rotary layer with QK-norm over one chunk, in float64: rotate, normalise with the model's own epsilon, attend causally."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    T, h = len(x), config.head_dim
    frequency = rotary_frequencies(h, config.rope_theta, config.rope_scaling).astype(np.float64)
    turn = np.exp(1j * np.arange(T)[:, None] * frequency)[:, None, None, :]
    qkv = np.einsum("td,kgfd->tkgf", x, w["qkv"])
    qk = (np.ascontiguousarray(qkv[:, :, :-1]).view(np.complex128) * turn).view(np.float64)
    qk = qk / np.sqrt((qk**2).mean(-1, keepdims=True) + config.rms_norm_eps)
    scores = np.einsum("tkgf,skf->kgts", qk[:, :, :-1], qk[:, :, -1]) / np.sqrt(h)
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    attended = np.einsum("kgts,skf->tkgf", weight / weight.sum(-1, keepdims=True), qkv[:, :, -1])
    return np.einsum("tkgf,dkgf->td", attended, w["out"])


# The mean square of a head is about the square of the input's scale: at 3e-3 the epsilon of 1e-5 decides the outcome.
@pytest.mark.parametrize("scale", [1.0, 3e-3])
def test_qk_norm_follows_the_rotation_and_has_the_models_epsilon(scale):
    config = scout_like()
    module = Attention(config, 0, ONE_DEVICE)
    weights = random_weights(module, jax.random.key(0), jnp.dtype(jnp.float32))
    x = (scale * np.random.default_rng(0).normal(size=(1, config.attention_chunk_size, config.hidden_size))).astype(np.float32)
    shape, bound = CacheShape(1, 1, 1), BoundModel(module)
    start, new = np.array([0], np.int32), np.array([x.shape[1]], np.int32)
    cache = empty_cache(shape, config)[0]

    @jax.jit
    def run(leaves, x, cache, tables):
        step = replicated_step(config, start, new, x.shape[1], tables)
        return bound.bind(leaves)(x, step, cache)[0]

    out = run(bound.leaves(weights), x, cache, shape.identity_tables([0]))
    expected = attention_reference(config, weights, x[0].astype(np.float64))
    np.testing.assert_allclose(out[0], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def silu(a):
    return a / (1 + np.exp(-a))


def moe_reference(weights, x):
    """Every expert on every token in float64, the chosen one picked afterwards."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    router = x @ w["router"].T
    chosen = router.argmax(-1)
    scored = x / (1 + np.exp(-router.max(-1, keepdims=True)))
    gate_up = np.einsum("md,ecfd->emcf", scored, w["experts_gate_up"])
    routed = np.einsum("emf,edf->emd", silu(gate_up[:, :, 0]) * gate_up[:, :, 1], w["experts_down"])[chosen, np.arange(len(x))]
    shared = np.einsum("md,cfd->mcf", x, w["shared.gate_up"])
    return routed + (silu(shared[:, 0]) * shared[:, 1]) @ w["shared.down"].T


@pytest.mark.parametrize("one_expert", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_experts_equal_the_dense_formula(tokens, one_expert):
    module = MixtureOfExperts(16, MoEConfig(num_experts=4, intermediate_size=24, moe_layers=(True,)), ONE_DEVICE)
    weights = random_weights(module, jax.random.key(3), jnp.dtype(jnp.float32))
    x = np.random.default_rng(1).normal(size=(1, tokens, 16)).astype(np.float32)
    if one_expert:
        x[..., 0] = 10.0
        weights["router"] = weights["router"].at[:, 0].set(jnp.array([0, 0, 5, 0], jnp.float32))
    bound = BoundModel(module)
    run = jax.jit(lambda leaves, x, valid: bound.bind(leaves)(x, valid))
    expected = moe_reference(weights, x[0].astype(np.float64))
    valid = np.ones((1, tokens), bool)
    np.testing.assert_allclose(run(bound.leaves(weights), x, valid)[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    # Padding among them changes nothing, whatever it holds, and is sent to no expert: what it gets is the shared expert's.
    valid = np.random.default_rng(2).random((1, tokens)) < 0.5
    padded = np.where(valid[:, :, None], x, np.float32(1e3))
    out = run(bound.leaves(weights), padded, valid)
    np.testing.assert_allclose(out[valid], expected[valid[0]], rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    shared_only = run(bound.leaves({**weights, "experts_down": jnp.zeros_like(weights["experts_down"])}), padded, valid)
    np.testing.assert_array_equal(out[~valid], shared_only[~valid])

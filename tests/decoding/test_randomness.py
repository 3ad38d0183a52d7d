"""Random numbers: the published generator, exact in both tails, independent of their neighbours, and none used for two purposes."""

from __future__ import annotations

import itertools
import math

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import LLM, SamplingParams
from l4jax.decoding import draft, randomness, sampling, verify
from l4jax.decoding.randomness import Purpose, gumbel, stream_keys, threefry, uniform
from tests.decoding.limits import chi_square_limit, poisson_limits
from tests.decoding.noise import gumbel_of_bits, token_noise
from tests.tiny import drafter, llama3_like, loaded_drafter, prompts, weights


def words(*values):
    return tuple(jnp.asarray([value], jnp.uint32) for value in values)


def seeds_2(values):
    return jnp.asarray([[seed >> 32, seed & 0xFFFFFFFF] for seed in values], jnp.uint32)


def rank_of(noise):
    """Noise as the uniform number of the same rank."""
    return jnp.exp(-jnp.exp(-noise))


@pytest.mark.parametrize(
    ("key", "counter", "expected"),  # Random123's kat_vectors
    [
        ((0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
        ((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0xFD36D048, 0x2D17272C)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xBA3E4725, 0xF27D669E)),
    ],
)
def test_the_generator_is_threefry_with_13_rounds(key, counter, expected):
    assert tuple(int(word[0]) for word in threefry(words(*key), words(*counter))) == expected


def test_with_20_rounds_it_is_jax_s():
    bits = np.random.default_rng(0).integers(0, 2**32, (4, 1000), np.uint32)
    for key in bits[:2, :5].T:
        own = threefry(tuple(jnp.full(1000, word) for word in key), (jnp.asarray(bits[2]), jnp.asarray(bits[3])), 20)
        np.testing.assert_array_equal(jnp.concatenate(own), jax.extend.random.threefry_2x32(tuple(key), bits[2:].reshape(-1)))


def test_noise_is_the_documented_function():
    """Compare noise with the reference for the smallest and largest values of seed, position, purpose and index, and for many tokens."""
    cases = itertools.product((0, 1, 2**32, 2**64 - 1), (0, 1, 2**31 - 1), Purpose, (0, 1, 2**24 - 1))
    for seed, position, purpose, index in cases:
        key_12 = stream_keys(seeds_2([seed]), jnp.asarray([position], jnp.int32), purpose, index)
        found = np.asarray(gumbel(key_12, jnp.arange(64, dtype=jnp.int32)))[0]
        np.testing.assert_allclose(found, token_noise(seed, position, 64, purpose * 2**24 + index), rtol=1e-6, atol=3e-7)


def test_noise_of_any_bits_has_float32_precision(monkeypatch):
    """Noise made of the lowest, the highest and the middle bits, and of many others, is exact; both tails end where 64 bits end."""
    edges = [
        0,
        1,
        2,
        2**31 - 1,
        2**31,
        2**31 + 1,
        2**32 - 2,
        2**32 - 1,
        *(2**i for i in range(2, 31)),
        *(2**32 - 2**i for i in range(2, 31)),
    ]
    pairs = np.array(list(itertools.product(edges, edges)), np.uint32)
    pairs = np.concatenate([pairs, np.random.default_rng(0).integers(0, 2**32, (100_000, 2), np.uint32)])
    monkeypatch.setattr(randomness, "threefry", lambda *_: (jnp.asarray(pairs[None, :, 0]), jnp.asarray(pairs[None, :, 1])))
    found = np.asarray(gumbel(jnp.zeros((1, 2), jnp.uint32), jnp.zeros(len(pairs), jnp.int32)))[0]
    expected = gumbel_of_bits(pairs[:, 0], pairs[:, 1])
    # Where noise is near 0 its logarithm's argument is near 1, and float32 holds that to 6e-8.
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=3e-7)
    assert found.min() == pytest.approx(-math.log(65 * math.log(2)), rel=1e-6)
    assert found.max() == pytest.approx(65 * math.log(2), rel=1e-6)


@pytest.mark.optimized  # it computes for longer than it compiles
def test_both_tails_of_noise_have_their_frequencies():
    """Over 268 million numbers: noise of float32 uniform numbers would end at 16.64 above and at -2.81 below."""
    rows, tokens, rounds = 32, 4096, 2048
    high, low = (4, 8, 12, 16.7), (-1, -2.5, -2.82)

    @jax.jit
    def beyond():
        def block(number, counts):
            seed_B2 = jnp.stack([jnp.arange(rows), jnp.full(rows, number)], axis=1).astype(jnp.uint32)
            noise_BV = gumbel(stream_keys(seed_B2, jnp.zeros(rows, jnp.int32), Purpose.TOKEN), jnp.arange(tokens, dtype=jnp.int32))
            found = [jnp.sum(noise_BV > x) for x in high] + [jnp.sum(noise_BV < x) for x in low]
            return counts + jnp.stack(found)

        return jax.lax.fori_loop(0, rounds, block, jnp.zeros(len(high) + len(low), jnp.int32))

    chances = [-math.expm1(-math.exp(-x)) for x in high] + [math.exp(-math.exp(-x)) for x in low]
    for x, count, chance in zip(high + low, np.asarray(beyond()).tolist(), chances, strict=True):
        least, most = poisson_limits(chance * rows * tokens * rounds)
        assert 0 < least <= count <= most, x


def test_neighbours_are_independent():
    """Of tokens, positions, indices, purposes and seeds: joint frequencies of 16 by 16 cells, and of 16 cells alone."""
    tokens = 512
    seeds, positions, indices = np.meshgrid(np.arange(16) + 2**40, np.arange(16), np.arange(8), indexing="ij")

    def noise(seeds, positions, indices, purpose):
        key_B2 = jax.vmap(lambda seed_2, position, index: stream_keys(seed_2[None], position[None], purpose, index)[0])(
            seeds_2(seeds.ravel().tolist()), jnp.asarray(positions.ravel(), jnp.int32), jnp.asarray(indices.ravel(), jnp.int32)
        )
        ranks = np.asarray(rank_of(gumbel(key_B2, jnp.arange(tokens, dtype=jnp.int32))))
        return np.minimum((ranks * 16).astype(int), 15).reshape(*seeds.shape, tokens)

    one = noise(seeds, positions, indices, Purpose.DRAFT)
    others = {
        "token": np.roll(one, 1, axis=3),
        "position": noise(seeds, positions + 1, indices, Purpose.DRAFT),
        "index": noise(seeds, positions, indices + 1, Purpose.DRAFT),
        "purpose": noise(seeds, positions, indices, Purpose.ACCEPTANCE),
        "seed": noise(seeds + 1, positions, indices, Purpose.DRAFT),
        "seed's high word": noise(seeds + 2**32, positions, indices, Purpose.DRAFT),
    }
    alone = np.bincount(one.ravel(), minlength=16)
    assert ((alone - one.size / 16) ** 2 / (one.size / 16)).sum() < chi_square_limit(15)
    for name, other in others.items():
        joint = np.bincount((16 * one + other).ravel(), minlength=256)
        assert ((joint - one.size / 256) ** 2 / (one.size / 256)).sum() < chi_square_limit(255), name


def test_every_bit_of_every_input_changes_half_of_the_output():
    """Flipping any input bit (of seed, position, purpose and index, or token) flips each of the 64 output bits half of the time."""
    count = 4096
    rng = np.random.default_rng(0)
    seed_B2 = rng.integers(0, 2**32, (count, 2), np.uint32)
    position_B, stream_B, token_B = (rng.integers(0, 2**32, count, np.uint32) for _ in range(3))

    @jax.jit
    def bits(seed_B2, position_B, stream_B, token_B):
        key_2 = threefry((seed_B2[:, 0], seed_B2[:, 1]), (position_B, stream_B))
        out_2B = jnp.stack(threefry(key_2, (token_B, jnp.zeros_like(token_B))))
        return (out_2B[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None, :, None] & jnp.uint32(1)).reshape(64, -1)

    inputs = [seed_B2[:, 0], seed_B2[:, 1], position_B, stream_B, token_B]
    before = np.asarray(bits(seed_B2, *inputs[2:]))
    for word, bit in itertools.product(range(5), range(32)):
        changed = [value ^ np.uint32((1 << bit) * (word == i)) for i, value in enumerate(inputs)]
        flipped = (np.asarray(bits(np.stack(changed[:2], axis=1), *changed[2:])) != before).mean(axis=1)
        assert np.abs(flipped - 0.5).max() < 6.7 * 0.5 / count**0.5, (word, bit)


def test_streams_have_keys_of_their_own():
    """No key serves two purposes, positions or indices of one seed."""
    position_B = jnp.arange(300, dtype=jnp.int32)
    seed_B2 = jnp.broadcast_to(seeds_2([12345]), (300, 2))
    keys = [stream_keys(seed_B2, position_B, purpose, index) for purpose in Purpose for index in range(30)]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 300 * 30 * len(Purpose)


def test_what_drafts_accepts_and_draws_does_not_correlate():
    """The same seed, position and index for every purpose; noise of two tokens and the uniform number, over 20,000 seeds."""
    count = 20_000
    seed_B2, position_B = seeds_2(range(count)), jnp.full(count, 7, jnp.int32)
    numbers = []
    for purpose in Purpose:
        for index in (0, 1):
            key_B2 = stream_keys(seed_B2, position_B, purpose, index)
            numbers += [uniform(key_B2)] if purpose == Purpose.ACCEPTANCE else [*rank_of(gumbel(key_B2, jnp.arange(2, dtype=jnp.int32))).T]
    correlation = np.corrcoef(np.stack(numbers).astype(np.float64))
    assert np.abs(correlation - np.eye(len(numbers))).max() < 6 / count**0.5


def test_a_round_uses_no_key_for_two_things(monkeypatch, tmp_path):
    """As compiled, speculation with sampled drafts takes the numbers that draft, accept and draw each from the streams for that purpose."""
    used: dict[str, set[tuple[int, ...]]] = {"draft": set(), "accept": set(), "choose": set()}

    def recording(name, function):
        def wrapped(key_B2, *arguments):
            jax.debug.callback(lambda key_B2: used[name].update(map(tuple, np.asarray(key_B2).tolist())), key_B2)
            return function(key_B2, *arguments)

        return wrapped

    monkeypatch.setattr(draft, "gumbel", recording("draft", gumbel))
    monkeypatch.setattr(verify, "uniform", recording("accept", uniform))
    monkeypatch.setattr(sampling, "gumbel", recording("choose", gumbel))
    config = llama3_like(vocab_size=8, num_layers=1, rope_layers=(True,), hidden_size=16, intermediate_size=16)
    made = loaded_drafter(drafter(config, "eagle1"))
    (tree := tmp_path / "tree.json").write_text("[[0], [1], [0, 0]]")
    llm = LLM(config, weights(config), drafter=made, speculation=f"tree:{tree},sampled", max_batch=4)
    llm.generate(prompts(config, (3,) * 4), [SamplingParams(max_tokens=24, seed=seed) for seed in range(4)])
    jax.effects_barrier()
    assert all(len(keys) > 40 for keys in used.values())
    for one, other in itertools.combinations(used.values(), 2):
        assert not one & other

    def streams(purpose, positions):
        """Keys of the four seeds and of every node's index."""
        seeds, positions = np.meshgrid(range(4), positions, indexing="ij")
        seed_B2, position_B = seeds_2(seeds.ravel().tolist()), jnp.asarray(positions.ravel(), jnp.int32)
        return {tuple(key) for index in range(4) for key in np.asarray(stream_keys(seed_B2, position_B, purpose, index)).tolist()}

    # A tree's drafts may be for positions after the last. Rows of padding are as if at position 0, which has no drafts in a real row.
    after_first = range(24 + 3)
    assert used["draft"] <= streams(Purpose.DRAFT, after_first)
    assert used["accept"] <= streams(Purpose.ACCEPTANCE, after_first)
    # The prompt's pass draws the first token, without drafts.
    assert used["choose"] <= streams(Purpose.TOKEN, [0]) | streams(Purpose.RESIDUAL, after_first)

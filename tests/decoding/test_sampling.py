"""The sampler against sorted float64 references, and the draw against its documented noise."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from l4jax.decoding.params import SamplingParams
from l4jax.decoding.randomness import Purpose
from l4jax.decoding.sampling import (
    NOT_FINITE,
    TokenCounts,
    adjust_logits,
    draw,
    highest_token,
    sample,
    token_logprobs,
    truncate,
)
from sharding.mesh import MeshSpec
from tests.decoding.limits import assert_frequencies
from tests.decoding.noise import token_noise
from tests.decoding.rows import sampling_rows

compiled_truncate = jax.jit(truncate)
compiled_draw = jax.jit(draw, static_argnames=("purpose", "vocab_ranks"))
compiled_sample = jax.jit(sample, static_argnames="vocab_ranks")


def rows_of(*params, vocab=50, seeds=None):
    return sampling_rows(params, seeds or [0] * len(params), [[]] * len(params), vocab)


def no_counts(rows, vocab=50):
    return TokenCounts(jnp.zeros((rows, vocab), bool), jnp.zeros((rows, vocab), jnp.int32))


def reference_probabilities(logits, params):
    """Temperature, min-p, top-k, top-p by sorting, in float64; tokens that tie at a cut are kept."""
    scaled = logits.astype(np.float64) / params.temperature
    p = np.exp(scaled - scaled.max())
    p[p < params.min_p] = 0
    if params.top_k:
        p[p < np.sort(p)[::-1][min(params.top_k, len(p)) - 1]] = 0
    p /= p.sum()
    if params.top_p < 1:
        descending = np.sort(p)[::-1]
        p[p < descending[np.searchsorted(np.cumsum(descending), params.top_p)]] = 0
    return p / p.sum()


def reference_logits(logits, params, in_prompt, in_output):
    """Bias and penalties, in float64, by their formulas."""
    logits = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    repeated = in_prompt | (in_output > 0)
    repetition = np.where(repeated, params.repetition_penalty, 1.0)
    logits = np.where(logits > 0, logits / repetition, logits * repetition)
    return logits - params.presence_penalty * (in_output > 0) - params.frequency_penalty * in_output


settings_of = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 60),
    top_p=st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.lists(settings_of, min_size=2, max_size=2))
def test_truncation_equals_the_sorted_reference(seed, params):
    # Logits a hundredth apart at least: no two probabilities are within rounding of each other or of a cut.
    rng = np.random.default_rng(seed)
    logits = np.stack([rng.permutation(50) for _ in params]).astype(np.float32) / 7 + np.float32(0.003)
    log_weights, kept = compiled_truncate(jnp.asarray(logits), rows_of(*params), logits.max(-1))
    weights = np.where(kept, np.exp(np.asarray(log_weights, np.float64)), 0)
    for row, p in enumerate(params):
        expected = reference_probabilities(logits[row], p)
        got = weights[row] / weights[row].sum()
        boundary = reference_probabilities(logits[row], SamplingParams(**{**vars(p), "top_p": min(1.0, p.top_p * (1 + 1e-5))}))
        if ((got > 0) == (boundary > 0)).all():  # a cumulative sum that meets top_p to within float32 rounding
            expected = boundary
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-7)


def test_ties_at_the_cut_are_kept():
    logits = jnp.array([[1.0, 3.0, 2.0, 2.0]])
    _, kept = compiled_truncate(logits, rows_of(SamplingParams(top_k=2), vocab=4), jnp.array([3.0]))
    assert kept.tolist() == [[False, True, True, True]]


def test_top_p_keeps_no_more_than_it_must_and_at_1_everything():
    """A token that alone has exactly the mass that is wanted, and a little less of it; a token too unlikely to change any sum."""
    less = 2.0**-10
    exactly = np.float32(1 / (1 + less))
    assert exactly * np.float32(1 + less) == 1.0
    params = [SamplingParams(top_p=float(top_p)) for top_p in (exactly, exactly + np.float32(2.0**-21), 1.0, 0.999)]
    logits = jnp.asarray([[0.0, np.log(less)]] * 2 + [[0.0, -80.0]] * 2, jnp.float32)
    _, kept = compiled_truncate(logits, rows_of(*params, vocab=2), jnp.zeros(4))
    assert kept.tolist() == [[True, False], [True, True], [True, True], [True, False]]


def test_top_k_of_one_is_greedy_whatever_the_noise():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 50)), jnp.float32)
    params = [SamplingParams(temperature=5.0, top_k=1)] * 64
    rows = rows_of(*params, seeds=list(range(64)))
    token = compiled_sample(logits, rows, no_counts(64), jnp.zeros(64, jnp.int32))
    np.testing.assert_array_equal(token, np.argmax(logits, axis=-1))


def test_penalties_and_bias_follow_their_formulas():
    logits = np.array([[2.0, -2.0, 1.0, 0.5, -1.0, 3.0]], np.float32)
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={4: 1.5, 5: -float("inf")})
    counts = TokenCounts(jnp.array([[True, True, False, False, False, False]]), jnp.array([[0, 0, 3, 0, 1, 0]], jnp.int32))
    # Tokens 0 and 1 only in the prompt: repetition. 2 three times in the output: all three. 4: bias first, then as 2.
    expected = [1.0, -4.0, 1.0 / 2 - 0.25 - 1.5, 0.5, 0.5 / 2 - 0.25 - 0.5, -np.inf]
    nowhere = jnp.zeros(1, jnp.int32)
    np.testing.assert_allclose(adjust_logits(jnp.asarray(logits), rows_of(params, vocab=6), counts, nowhere)[0], expected, rtol=1e-6)


def test_end_tokens_have_no_weight_before_min_tokens():
    params = SamplingParams(min_tokens=2, max_tokens=9, logit_bias={3: 1.0})
    rows = sampling_rows([params] * 3, [0] * 3, [[1, 4]] * 3, 6)
    found = adjust_logits(jnp.zeros((3, 6)), rows, no_counts(3, 6), jnp.array([0, 1, 2], jnp.int32))
    early = [0, -np.inf, 0, 1, -np.inf, 0]
    np.testing.assert_array_equal(found, [early, early, [0, 0, 0, 1, 0, 0]])


@pytest.mark.parametrize("vocab", [1, 5, 128, 129, 700])
def test_the_highest_token_is_numpy_s(vocab):
    """Of equal values the first token wins. Rows with an infinity, and rows of nothing but -inf, are among the others."""
    values = np.random.default_rng(vocab).integers(0, 30, (64, vocab)).astype(np.float32)
    values[::7] = -np.inf
    values[3, vocab // 2] = np.inf
    highest, token = highest_token(jnp.asarray(values))
    np.testing.assert_array_equal(highest, values.max(-1))
    np.testing.assert_array_equal(token, values.argmax(-1))
    values[5, vocab // 3] = np.nan
    highest, token = highest_token(jnp.asarray(values))
    assert (highest[5], token[5]) == (np.inf, vocab // 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_logit_that_is_not_finite_is_no_token(temperature):
    """One NaN or infinity, at any place of a row, gives NOT_FINITE; a row beside it still gets its token."""
    logits = np.zeros((700, 700), np.float32)
    np.fill_diagonal(logits, np.nan)
    logits[5], logits[6, 6], logits[7] = 0.0, np.inf, -np.inf
    params = [SamplingParams(temperature=temperature)] * 700
    token = compiled_sample(jnp.asarray(logits), rows_of(*params, vocab=700), no_counts(700, 700), jnp.zeros(700, jnp.int32))
    assert int(token[5]) >= 0 and (np.delete(token, 5) == NOT_FINITE).all()


SEEDS = [0, 1, 2**32 + 5, 2**64 - 1]


@functools.cache
def oracle_noise(vocab, positions=16):
    """[positions * seeds, vocab], in float64."""
    return np.stack([token_noise(seed, position, vocab) for position in range(positions) for seed in SEEDS])


def assert_draws_of_oracle(token_B, score_BV):
    """The highest of these scores, or one that float32 cannot tell from it."""
    chosen_B = np.take_along_axis(score_BV, np.asarray(token_B)[:, None], axis=1)[:, 0]
    gap_B = score_BV.max(-1) - chosen_B
    assert gap_B.max() < 1e-5 and (gap_B > 0).mean() < 0.01


def test_a_draw_is_the_highest_of_the_documented_sums():
    """In every combination of cuts and penalties; a token at a cut's border may be on either side of it."""
    vocab, count = 600, 16 * len(SEEDS)
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(count, vocab))).astype(np.float32)
    in_prompt, in_output = rng.random((count, vocab)) < 0.1, rng.integers(0, 3, (count, vocab)) * (rng.random((count, vocab)) < 0.1)
    counts = TokenCounts(jnp.asarray(in_prompt), jnp.asarray(in_output, jnp.int32))
    cuts = itertools.product((0.5, 1.0, 1.7), (0, 40), (0.9, 1.0), (0.0, 0.02))
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.4, "logit_bias": {3: 5.0, 4: -np.inf}}
    for (temperature, top_k, top_p, min_p), adjusting in itertools.product(cuts, ({}, penalties)):
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, **adjusting)
        rows = rows_of(*[params] * count, vocab=vocab, seeds=SEEDS * 16)
        position_B = jnp.repeat(jnp.arange(16, dtype=jnp.int32), len(SEEDS))
        token_B = compiled_sample(jnp.asarray(logits), rows, counts, position_B)
        adjusted = logits
        if adjusting:
            adjusted = np.stack([reference_logits(*row[:1], params, *row[1:]) for row in zip(logits, in_prompt, in_output, strict=True)])
        chance_BV = np.stack([reference_probabilities(row, params) for row in adjusted])
        with np.errstate(divide="ignore"):
            assert_draws_of_oracle(token_B, np.log(chance_BV) + oracle_noise(vocab))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_draw_is_the_same_on_a_sharded_vocabulary(ranks):
    """1,560 tokens in shards that are no multiple of a block; some rows are greedy, and in some two tokens of different ranks tie."""
    vocab, count = 8 * 195, 512
    rng = np.random.default_rng(0)
    values = (2 * rng.normal(size=(count, vocab))).astype(np.float32)
    params = [SamplingParams(temperature=1.0 if row % 4 else 0.0) for row in range(count)]
    values[:16, [300, 1500]] = 50.0
    rows = jax.device_put(rows_of(*params, vocab=vocab, seeds=range(count)))
    position_B = jnp.arange(count, dtype=jnp.int32)
    alone_B = compiled_draw(jnp.asarray(values), rows, position_B, purpose=Purpose.TOKEN)
    spec = MeshSpec.parse(f"tensor={ranks}")
    along = spec.along("tensor")

    specs = {"in_specs": PartitionSpec(None, along.axes), "out_specs": PartitionSpec(), "check_vma": False}

    @jax.jit
    @functools.partial(jax.shard_map, mesh=spec.build(jax.devices()[:ranks]), **specs)
    def sharded(values_BV):
        return draw(values_BV, rows, position_B, Purpose.TOKEN, along)

    np.testing.assert_array_equal(sharded(jnp.asarray(values)), alone_B)
    np.testing.assert_array_equal(alone_B[:16:4], 300)


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 3},
    {"top_p": 0.8, "min_p": 0.2},
    {"temperature": 1.4, "top_k": 6, "top_p": 0.85},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.05},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 0.6, "frequency_penalty": -0.4, "top_p": 0.9},
    {"repetition_penalty": 0.7, "min_p": 0.1, "logit_bias": {0: -1.0, 9: 2.5}},
    {"temperature": 1.3, "top_k": 7, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2, "presence_penalty": 0.3}
    | {"frequency_penalty": 0.2, "logit_bias": {2: 1.0, 3: -np.inf}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings) or "nothing")
def test_draws_have_the_right_frequencies(settings):
    """Over 200,000 draws, half by seed and half by position: a chi-square that fails by chance once in 1e9 runs."""
    count, vocab = 200_000, 10
    params = SamplingParams(**settings)
    logits = np.array([2.0, 1.4, 1.1, 0.6, 0.2, -0.1, -0.6, -1.2, -2.4, -3.5], np.float32)
    in_prompt, in_output = np.arange(vocab) % 3 == 0, np.array([2, 0, 0, 1, 0, 3, 0, 0, 0, 1])
    expected = reference_probabilities(reference_logits(logits, params, in_prompt, in_output), params)

    def in_every_row(value):
        return jnp.broadcast_to(value, (count, *value.shape[1:]))

    rows = jax.tree.map(in_every_row, rows_of(params, vocab=vocab))
    number = np.arange(count // 2, dtype=np.uint32)
    seed_B2 = np.zeros((count, 2), np.uint32)
    seed_B2[: count // 2, 1] = number
    rows = dataclasses.replace(rows, seed_B2=jnp.asarray(seed_B2))
    position_B = jnp.concatenate([jnp.full(count // 2, 5, jnp.int32), jnp.asarray(number, jnp.int32)])
    counts = TokenCounts(in_every_row(jnp.asarray(in_prompt)[None]), in_every_row(jnp.asarray(in_output, jnp.int32)[None]))
    rows = dataclasses.replace(rows, slot_B=jnp.arange(count, dtype=jnp.int32))
    token_B = compiled_sample(in_every_row(jnp.asarray(logits)[None]), rows, counts, position_B)
    assert_frequencies(np.bincount(token_B, minlength=vocab), expected)


def test_logprobs_are_of_the_model_before_any_processor():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 50)), jnp.float32)
    rows = rows_of(SamplingParams(temperature=0.5, top_k=1, logit_bias={3: 50.0}, logprobs=4))
    token = compiled_sample(logits, rows, no_counts(1), jnp.zeros(1, jnp.int32))
    logprobs = token_logprobs(logits, token, jnp.any(rows.reported_B))
    expected = np.asarray(jax.nn.log_softmax(logits))[0]
    assert int(token[0]) == 3
    np.testing.assert_allclose(logprobs.chosen_B[0], expected[3], rtol=1e-6)
    np.testing.assert_array_equal(logprobs.top_id_Bj[0, :4], np.argsort(-expected)[:4])
    unasked = token_logprobs(logits, token, jnp.any(rows_of(SamplingParams()).reported_B))
    assert not any(leaf.any() for leaf in jax.tree.leaves(unasked))


def test_a_row_s_token_does_not_depend_on_what_other_rows_ask_for():
    """Greedy rows go through the draw beside sampled ones, and rows without penalties through the penalties beside others."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(np.round(3 * rng.normal(size=(4, 50)), 1), jnp.float32)  # with ties
    counts = TokenCounts(jnp.asarray(rng.random((4, 50)) < 0.3), jnp.asarray(rng.integers(0, 3, (4, 50)), jnp.int32))
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_k=9),
        SamplingParams(temperature=0.0, repetition_penalty=1.4),
        SamplingParams(temperature=1.0, frequency_penalty=0.5, logprobs=3),
    ]
    together = compiled_sample(logits, rows_of(*params, seeds=range(4)), counts, jnp.zeros(4, jnp.int32))
    for row, of_row in enumerate(params):
        rows = dataclasses.replace(rows_of(of_row, seeds=[row]), slot_B=np.array([row], np.int32))  # counts stay where they are
        alone = compiled_sample(logits[row : row + 1], rows, counts, jnp.zeros(1, jnp.int32))
        assert alone[0] == together[row]


def test_lists_are_as_long_as_the_programs_have_room_for():
    most = SamplingParams(logit_bias=dict.fromkeys(range(1024), 1.0))
    assert rows_of(most, vocab=2000).bias_id_Bj.shape == (1, 1024)
    with pytest.raises(ValueError, match="logit_bias has 1025 tokens; expected at most 1024; leave out"):
        SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {1: float("nan")}),
        ("stop", [""]),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", 21),
        ("max_tokens", None),
        ("max_tokens", True),
        ("temperature", "hot"),
        ("temperature", 1e300),
        ("top_k", 2**40),
        ("top_p", None),
        ("repetition_penalty", 1e-50),
        ("frequency_penalty", "much"),
        ("logit_bias", [(1, 2.0)]),
        ("logit_bias", {1: float("inf")}),
        ("logit_bias", {"a": 1.0}),
        ("stop", 3),
        ("stop_token_ids", 3),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", {3: "a"}),
        ("stop", {"a": 1}),
        ("ignore_eos", "false"),
        ("ignore_eos", 1),
        ("stop_token_ids", b"\x01"),
        ("stop_token_ids", bytearray(b"\x01")),
        ("stop_token_ids", memoryview(b"\x01")),
        ("stop_token_ids", [True]),
        ("logit_bias", {1: True}),
        ("logit_bias", {True: 1.0}),
        *((name, True) for name in ("temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty")),
        *((name, np.False_) for name in ("temperature", "min_p", "top_k", "seed", "logprobs")),
    ],
)
def test_a_bad_value_is_named_in_one_line(field, value):
    with pytest.raises(ValueError, match=rf"^{field} is .*; expected .*$"):
        SamplingParams(**{field: value})


def test_numbers_may_be_numpys():
    """They are kept as Python's own, which have the methods that numpy's lack, and read the same in every process."""
    params = SamplingParams(
        max_tokens=np.int64(3),
        temperature=np.float32(0.5),
        top_k=np.int32(2),
        logit_bias={np.int64(4): np.float32(1.5)},
        stop_token_ids=np.array([1, 2]),
        ignore_eos=np.True_,
        seed=np.uint64(2**63),
        logprobs=np.int8(2),
    )
    own = SamplingParams(
        max_tokens=3,
        temperature=0.5,
        top_k=2,
        logit_bias={4: 1.5},
        stop_token_ids=(1, 2),
        ignore_eos=True,
        seed=2**63,
        logprobs=2,
    )
    assert repr(params) == repr(own)
    assert type(params.max_tokens) is int and type(params.temperature) is float and type(params.ignore_eos) is bool

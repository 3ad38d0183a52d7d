"""Ring attention against attention written out over whole sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from sharding.layout import EMPTY, balanced, batch, padded
from sharding.mesh import MeshSpec
from sharding.ring import attend_positions, pass_kv, pass_q

VARIANTS = {"pass_kv": pass_kv, "pass_q": pass_q}
K, G, H = 2, 3, 4
SCALE = 0.7
ROWS, MOST_NEW, MOST_CACHED = 3, 300, 500


@functools.cache
def ring(variant, ranks, chunked):
    """The compiled ring over arrays that lead with the rank."""
    mesh = MeshSpec(sequence=ranks).build()
    ranked, same = PartitionSpec("sequence"), PartitionSpec()

    def on_rank(q, k, v, query_position, key_position, chunk):
        options = {"axis_name": "sequence", "scale": SCALE, "chunk": chunk if chunked else None}
        out, lse = VARIANTS[variant](q[0], k[0], v[0], query_position, key_position, **options)
        return out[None], lse[None]

    return jax.jit(
        jax.shard_map(on_rank, mesh=mesh, in_specs=(ranked, ranked, ranked, same, same, same), out_specs=ranked, check_vma=False)
    )


def attention(q_TKGh, k_SKh, v_SKh, positions_T, chunk):
    """Whole-sequence attention in float64: (output, log-sum-exp)."""
    key = np.arange(len(k_SKh))[None]
    query = positions_T[:, None]
    visible = (key <= query) & (True if chunk is None else key // chunk == query // chunk)
    scores = np.where(visible[:, None, None], SCALE * np.einsum("tkgh,skh->tkgs", q_TKGh, k_SKh), -np.inf)
    highest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("tkgs,skh->tkgh", weights / total, v_SKh), (np.log(total) + highest)[..., 0]


def decoded(length, ranks, first):
    """Decoded tokens, position p on rank p mod ranks."""
    positions = np.arange(first, first + length)
    return padded([positions[positions % ranks == rank] for rank in range(ranks)])


def append(layout, later):
    """Each rank's positions followed by its later ones, with no empty slot between."""
    return padded([np.concatenate([row[row != EMPTY], more[more != EMPTY]]) for row, more in zip(layout, later, strict=True)])


def spread(array_SX, layout_NS):
    """The rows that each rank holds; empty slots have values that would show."""
    return np.where((layout_NS == EMPTY).reshape(*layout_NS.shape, *[1] * (array_SX.ndim - 1)), 1e3, array_SX[layout_NS])


def check(variant, ranks, lengths, chunk, block, dtype, tolerance, seed):
    """One batch of sequences, (cached, new) tokens each, compared at every new position."""
    rng = np.random.default_rng(seed)
    queries = batch([balanced(new, ranks, first=cached, block=block) for cached, new in lengths], -(-MOST_NEW // ranks))
    # What was cached came by prefill and by decoding.
    cached_by_decode = [cached // 3 for cached, _ in lengths]
    before = [append(balanced(c - d, ranks), decoded(d, ranks, first=c - d)) for (c, _), d in zip(lengths, cached_by_decode, strict=True)]
    own = [balanced(new, ranks, first=cached, block=block) for cached, new in lengths]
    keys = batch([append(a, b) for a, b in zip(before, own, strict=True)], -(-(MOST_NEW + MOST_CACHED) // ranks) + 2)
    arrays = []
    for cached, new in lengths:
        total = max(cached + new, 1)
        arrays.append([rng.normal(size=(total, *shape)).astype(dtype) for shape in ((K, G, H), (K, H), (K, H))])
    stacked = [
        np.stack([spread(a[which], layout[:, row]) for row, a in enumerate(arrays)], axis=1).astype(dtype)
        for which, layout in ((0, queries), (1, keys), (2, keys))
    ]
    out, lse = map(np.asarray, ring(variant, ranks, chunk is not None)(*stacked, queries, keys, np.int32(chunk or 1)))
    for row, (q, k, v) in enumerate(arrays):
        for rank in range(ranks):
            slots = np.flatnonzero(queries[rank, row] != EMPTY)
            positions = queries[rank, row, slots]
            if len(positions) == 0:
                continue
            expected_out, expected_lse = attention(*(a.astype(np.float64) for a in (q[positions], k, v)), positions, chunk)
            np.testing.assert_allclose(out[rank, row, slots], expected_out, rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(lse[rank, row, slots], expected_lse, rtol=tolerance, atol=tolerance)


LENGTHS = st.lists(st.tuples(st.integers(0, MOST_CACHED), st.integers(0, MOST_NEW)), min_size=ROWS, max_size=ROWS)


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.more_meshes if n in (1, 4) else ()) for n in (1, 2, 4, 8)])
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=12)
@given(LENGTHS, st.none() | st.sampled_from([1, 5, 37, 64, 1000]), st.booleans(), st.integers(0, 2**32 - 1))
def test_rings_equal_plain_attention_in_float64(variant, ranks, lengths, chunk, aligned, seed):
    with jax.enable_x64(True):
        check(variant, ranks, lengths, chunk, chunk if chunk and aligned else 1, np.float64, 1e-12, seed)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "lengths",
    [[(0, 300), (500, 1), (0, 0)], [(0, 1), (1, 1), (7, 2)], [(500, 300), (499, 299), (3, 150)]],
    ids=["zero-length row", "few", "many"],
)
@pytest.mark.parametrize("chunk", [None, 64])
def test_rings_equal_plain_attention_in_float32(variant, ranks, lengths, chunk):
    check(variant, ranks, lengths, chunk, 1, np.float32, 2e-5, 0)


def test_bfloat16_is_merged_in_float32():
    """If partial results were rounded to bfloat16, the results would be bfloat16 numbers too; hardly any of them are."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(8, 1, 8, *shape)).astype(jnp.bfloat16) for shape in ((K, G, H), (K, H), (K, H)))
    positions = batch([balanced(64, 8)])
    for variant in VARIANTS:
        out, lse = map(np.asarray, ring(variant, 8, False)(q, k, v, positions, positions, np.int32(1)))
        assert out.dtype == lse.dtype == np.float32
        assert np.mean(out == out.astype(jnp.bfloat16)) < 0.05 and np.mean(lse == lse.astype(jnp.bfloat16)) < 0.05


def test_segments_must_make_up_all_keys():
    kv, q = np.zeros((2, 1, 5, K, H), np.float32), np.zeros((1, 2, K, G, H), np.float32)
    with pytest.raises(ValueError, match=r"segments \(2, 2\) are 4 slots; expected runs that make up all 5"):
        attend_positions(q, kv, np.zeros((1, 2), np.int32), np.zeros((1, 5), np.int32), segments=(2, 2), scale=1.0)


@pytest.mark.optimized
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_messages_are_those_of_the_paper(ranks):
    """Transfers in the compiled program, and their bytes: max_i P_i + ceil(T / N) tokens of keys and values; queries are smaller."""
    cached, new = 100, 50
    queries, keys = (
        batch([balanced(new, ranks, first=cached)]),
        batch([append(balanced(cached, ranks), balanced(new, ranks, first=cached))]),
    )
    tokens, own = keys.shape[2], queries.shape[2]
    assert tokens <= -(-cached // ranks) + -(-new // ranks)
    shapes = [(ranks, 1, own, K, G, H), (ranks, 1, tokens, K, H), (ranks, 1, tokens, K, H)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    for variant, message, exchanges in (("pass_kv", (2, 1, tokens, K, H), 0), ("pass_q", (1, own, K, G, H), 1)):
        text = ring(variant, ranks, False).lower(*arguments, queries, keys, np.int32(1)).compile().as_text()
        permutes = [line for line in text.splitlines() if " collective-permute(" in line or " collective-permute-start(" in line]
        assert len(permutes) == ranks - 1
        assert all(f"f32[{','.join(map(str, message))}]" in line for line in permutes)
        assert sum(" all-to-all(" in line for line in text.splitlines()) == exchanges
        assert not any(kind in text for kind in (" all-gather(", " all-reduce(", " reduce-scatter("))

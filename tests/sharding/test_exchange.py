"""Rows to other ranks and back, for every kind of imbalance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from sharding.exchange import RowExchange
from sharding.mesh import MeshSpec

M, D = 6, 3


@functools.cache
def there_and_back(ranks):
    spec = MeshSpec(expert=ranks)

    def on_rank(rows_MD, size_RR):
        exchange = RowExchange(spec.along("expert"), size_RR)
        arrived = exchange.send(rows_MD)
        return arrived[None], exchange.send_back(arrived * 2.0)

    cut, whole = PartitionSpec("expert"), PartitionSpec()
    return jax.jit(jax.shard_map(on_rank, mesh=spec.build(), in_specs=(cut, whole), out_specs=cut, check_vma=False))


def check(sizes):
    ranks = len(sizes)
    rows = np.random.default_rng(0).normal(size=(ranks, M, D)).astype(np.float32)
    arrived, back = there_and_back(ranks)(jnp.asarray(rows.reshape(-1, D)), np.asarray(sizes, np.int32))
    for rank in range(ranks):
        expected = [rows[sender, sum(sizes[sender][:rank]) :][: sizes[sender][rank]] for sender in range(ranks)]
        np.testing.assert_array_equal(np.asarray(arrived)[rank][: sum(map(len, expected))], np.concatenate(expected))
        sent = sum(sizes[rank])
        np.testing.assert_array_equal(np.asarray(back).reshape(ranks, M, D)[rank][:sent], 2 * rows[rank][:sent])


@st.composite
def matrices(draw):
    ranks = draw(st.sampled_from([2, 4, 8]))
    choices = draw(st.lists(st.lists(st.integers(0, ranks - 1), min_size=0, max_size=M), min_size=ranks, max_size=ranks))
    return [[row.count(to) for to in range(ranks)] for row in choices]


@settings(max_examples=40)
@given(matrices())
def test_every_row_arrives_and_comes_back(sizes):
    check(sizes)


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_to_one_rank_and_none_at_all(ranks):
    check([[M] + [0] * (ranks - 1)] * ranks)
    check([[0] * (ranks - 1) + [M]] * ranks)
    check([[0] * ranks] * ranks)

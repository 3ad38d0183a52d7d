"""Layouts: every position once, balanced, and chunks whole where they are to be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.layout import EMPTY, balanced, batch

RANKS = st.sampled_from([1, 2, 3, 4, 8])


def held(layout):
    return [row[row != EMPTY] for row in layout]


@given(st.integers(0, 300), RANKS, st.integers(0, 50), st.sampled_from([1, 7, 32]))
def test_every_position_lies_on_one_rank_in_ascending_order(length, ranks, first, block):
    layout = balanced(length, ranks, first=first, block=block)
    assert layout.shape[0] == ranks
    assert layout.dtype == np.int32
    assert sorted(np.concatenate(held(layout))) == list(range(first, first + length))
    for row in held(layout):
        assert (np.diff(row) > 0).all()


@given(st.integers(0, 300), RANKS)
def test_no_rank_has_more_than_its_part(length, ranks):
    assert balanced(length, ranks).shape[1] <= -(-length // ranks)


@given(st.integers(0, 300), RANKS, st.integers(0, 50), st.sampled_from([2, 7, 32]))
def test_no_block_lies_on_two_ranks(length, ranks, first, block):
    blocks = [set(row // block) for row in held(balanced(length, ranks, first=first, block=block))]
    assert sum(map(len, blocks)) == len(set().union(*blocks))


@given(st.integers(1, 300), RANKS, st.integers(0, 50), st.sampled_from([1, 7, 32]), st.integers(0, 7))
def test_the_last_position_lies_where_it_is_wanted(length, ranks, first, block, wanted):
    rows = held(balanced(length, ranks, first=first, block=block, last_on=wanted % ranks))
    assert rows[wanted % ranks][-1] == first + length - 1
    assert sorted(map(list, rows)) == sorted(map(list, held(balanced(length, ranks, first=first, block=block))))


@pytest.mark.parametrize(("length", "block"), [(2**17, 1), (2**17, 8192), (10**6, 1), (2**20, 8192)])
def test_attention_is_within_two_percent_on_every_rank(length, block):
    """Pairs of query and key that causal attention visits; chunk-local layers visit as many for every whole chunk."""
    pairs = [(row.astype(np.int64) + 1).sum() for row in held(balanced(length, 8, block=block))]
    assert max(pairs) <= 1.02 * min(pairs)


def test_the_papers_layout():
    assert balanced(8, 2).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_what_does_not_divide_lies_in_late_parts_and_on_the_first_ranks():
    """Of an odd number on a rank one more is in its late part; of a number that the ranks do not divide the first have one more."""
    assert balanced(6, 2).tolist() == [[0, 4, 5], [1, 2, 3]]
    assert balanced(7, 2).tolist() == [[0, 1, 5, 6], [2, 3, 4, EMPTY]]
    assert balanced(10, 2, first=2, block=4).tolist() == [[2, 3, 8, 9, 10, 11], [4, 5, 6, 7, EMPTY, EMPTY]]


def test_causal_work_is_balanced():
    work = [(row + 1).sum() for row in held(balanced(4096, 8))]
    assert max(work) / min(work) < 1.001


def test_a_million_tokens_of_llama_4_leave_every_chunk_whole():
    layout = balanced(2**20, 8, block=8192)
    assert layout.shape == (8, 2**17)
    assert (layout.reshape(8, -1, 8192) // 8192 == layout.reshape(8, -1, 8192)[:, :, :1] // 8192).all()


def test_sequences_are_cut_each_for_itself():
    layouts = batch([balanced(4, 2), balanced(0, 2), balanced(1, 2)])
    assert layouts.tolist() == [[[0, 3], [EMPTY, EMPTY], [0, EMPTY]], [[1, 2], [EMPTY, EMPTY], [EMPTY, EMPTY]]]


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="ranks 0"):
        balanced(3, 0)

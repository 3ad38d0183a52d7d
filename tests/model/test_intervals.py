"""Masks as intervals, against literal tables."""

import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.model.steps.replicated import full_intervals, local_intervals


def visible(intervals, row, start, chunk_slots=None):
    """Which positions each new token sees: '#' seen, '.' not, over cached then new positions of one row."""
    cached_end, new_start, new_end = (np.asarray(a)[row] for a in (intervals.cached.end_BT, intervals.new.start_BT, intervals.new.end_BT))
    lines = []
    for t in range(len(cached_end)):
        # Slot s of a chunk-local layer is the position of the current chunk with that remainder.
        first = 0 if chunk_slots is None else start // chunk_slots * chunk_slots
        seen = set(range(first, first + cached_end[t])) | {start + i for i in range(new_start[t], new_end[t])}
        lines.append("".join("#" if p in seen else "." for p in range(start + len(cached_end))))
    return lines


def ints(*values):
    return jnp.array(values, jnp.int32)


def test_full_attention_is_causal():
    assert visible(full_intervals(ints(2), ints(3), 3), 0, 2) == [
        "###..",
        "####.",
        "#####",
    ]


def test_chunks_are_hard_boundaries_not_windows():
    assert visible(local_intervals(ints(0), ints(9), 9, 4), 0, 0, 4) == [
        "#........",
        "##.......",
        "###......",
        "####.....",
        "....#....",
        "....##...",
        "....###..",
        "....####.",
        "........#",
    ]


def test_chunks_follow_absolute_positions_behind_a_cache():
    assert visible(local_intervals(ints(6), ints(7), 7, 4), 0, 6, 4) == [
        "....###......",
        "....####.....",
        "........#....",
        "........##...",
        "........###..",
        "........####.",
        "............#",
    ]


def test_vllm_virtual_batches_example():
    """Chunk 4, new lengths [4, 10, 5] at the end of sequences of [6, 17, 9]: the queries and keys of each chunk.

    The example is in the comments of vLLM's ``make_local_attention_virtual_batches``.
    """
    new, total = np.array([4, 10, 5]), np.array([6, 17, 9])
    intervals = local_intervals(jnp.asarray(total - new, jnp.int32), jnp.asarray(new, jnp.int32), 10, 4)
    queries, keys = [], []
    for row in range(3):
        lines = visible(intervals, row, (total - new)[row], 4)[: new[row]]
        chunk_of = [((total - new)[row] + t) // 4 for t in range(new[row])]
        for chunk in dict.fromkeys(chunk_of):
            rows = [line for line, c in zip(lines, chunk_of, strict=True) if c == chunk]
            queries.append(len(rows))
            keys.append(rows[-1].count("#"))
    assert queries == [2, 2, 1, 4, 4, 1, 4, 1]
    assert keys == [4, 2, 4, 4, 4, 1, 4, 1]


@pytest.mark.parametrize(
    ("start", "new", "expected"),
    [
        (0, 3, [0, 1, 2, -1, -1]),
        (2, 5, [-1, -1, 0, 1, 2]),  # the chunk that ends is not kept: nothing looks at it again
        (0, 4, [0, 1, 2, 3, -1]),  # a chunk just filled is kept until the next one begins
        (3, 1, [3, -1, -1, -1, -1]),
    ],
)
def test_slots_written_in_a_chunk_of_four(start, new, expected):
    assert np.asarray(local_intervals(ints(start), ints(new), 5, 4).slot_BT)[0].tolist() == expected


def test_full_layers_write_every_valid_token():
    assert np.asarray(full_intervals(ints(7), ints(2), 4).slot_BT)[0].tolist() == [7, 8, -1, -1]

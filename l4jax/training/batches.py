"""Packs sequences into rows of one length and rows into batches; chooses the vocabulary that a drafter is trained for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Int32

from l4jax.parallel.arrays import host_array
from l4jax.training.data import Example


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed sequences: the tokens, the column where each token's sequence begins, and whether the token is part of an answer.

    Each padding token is a sequence of its own. ``number_B``: the rows' numbers, which key a drafter's noise; -1 for padding.
    """

    token_BT: Int32[Array, "B T"]
    first_BT: Int32[Array, "B T"]
    answer_BT: Bool[Array, "B T"]
    number_B: Int32[Array, "B"]


def pack(examples: Sequence[Example], length: int, seed: int) -> Rows:
    """Pack all sequences into rows of ``length`` tokens, none cut: each goes to the fullest row that has room for it."""
    # Longest first leaves the least room unused; sequences of equal length go in shuffled order.
    order = sorted(np.random.default_rng(seed).permutation(len(examples)).tolist(), key=lambda i: -_length(examples[i]))
    rows: list[list[Example]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    for index in order:
        size = _length(examples[index])
        room = next((room for room in range(size, length + 1) if by_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, length
        else:
            row = by_room[room].pop()
        rows[row].append(examples[index])
        by_room[room - size].append(row)
    token_BT = np.zeros((len(rows), length), np.int32)
    first_BT = np.tile(np.arange(length, dtype=np.int32), (len(rows), 1))
    answer_BT = np.zeros((len(rows), length), bool)
    for row, packed in enumerate(rows):
        start = 0
        for example in packed:
            assert example.answer is not None
            end = start + _length(example)
            token_BT[row, start:end] = [*example.prompt, *example.answer]
            first_BT[row, start:end] = start
            answer_BT[row, start + len(example.prompt) : end] = True
            start = end
    numbers = np.arange(len(rows), dtype=np.int32)
    return Rows(host_array(token_BT, np.int32), host_array(first_BT, np.int32), host_array(answer_BT, bool), host_array(numbers, np.int32))


def _length(example: Example) -> int:
    assert example.answer is not None
    return len(example.prompt) + len(example.answer)


def batches_in(rows: Rows, size: int) -> int:
    """The number of batches that hold all rows; padding fills the last one."""
    return -(-len(rows.number_B) // size)


def batch(rows: Rows, size: int, step: int, seed: int) -> Rows:
    """The batch of this step. Every ``batches_in`` steps cover all rows, each time in another order."""
    epoch, index = divmod(step, batches_in(rows, size))
    order = np.random.default_rng((seed, epoch)).permutation(len(rows.number_B))
    return take(rows, order[index * size : (index + 1) * size], size)


def take(rows: Rows, index: np.ndarray, size: int) -> Rows:
    """These rows, padded to ``size``."""
    length, missing = rows.token_BT.shape[1], size - len(index)
    padding = Rows(
        host_array(np.zeros((missing, length)), np.int32),
        host_array(np.tile(np.arange(length), (missing, 1)), np.int32),
        host_array(np.zeros((missing, length)), bool),
        host_array(np.full(missing, -1), np.int32),
    )
    return jax.tree.map(lambda leaf, pad: np.concatenate([np.asarray(leaf)[index], np.asarray(pad)]), rows, padding)


def draft_vocabulary(examples: Sequence[Example], size: int) -> np.ndarray:
    """The ``size`` most frequent tokens of the answers, ascending; int32. Ties go to the lower token.

    Raises ValueError if the answers have fewer different tokens.
    """
    counts = Counter(token for example in examples for token in example.answer or ())
    if size > len(counts):
        raise ValueError(f"the draft vocabulary is {size}; expected at most {len(counts)}, the different tokens of the answers; lower it")
    frequent = sorted(counts, key=lambda token: (-counts[token], token))[:size]
    return np.array(sorted(frequent), np.int32)

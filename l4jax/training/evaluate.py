"""How long the accepted chains would be on given text: decoding replayed, round by round."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from l4jax.training.batches import Rows, batches_in, take
from l4jax.training.trainer import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class Replay:
    """Rounds of speculation, and in how many of them the drafted token at each depth stood."""

    rounds: int
    accepted: tuple[int, ...]

    @property
    def acceptance_length(self) -> float:
        """Tokens that a round gives on average, as :class:`l4jax.llm.Stats` has it; 1 without any round."""
        return 1.0 + sum(self.accepted) / self.rounds if self.rounds else 1.0


def replay(trainer: Trainer, state: TrainState, rows: Rows, batch: int, depth: int) -> Replay:
    """Rounds in which chains of ``depth`` tokens would have given the rows' answers, in batches of this size.

    A drafted token stands if it is the text's, which for the text that the target has drawn is what decoding it again would find, at
    that temperature and with that seed. What lies beyond the end of an answer does not count.
    """
    lengths: list[int] = []
    for index in range(batches_in(rows, batch)):
        chosen = np.arange(index * batch, min((index + 1) * batch, len(rows.number_B)))
        part = take(rows, chosen, batch)
        for accepted_T, first_T, answer_T in zip(trainer.accepted(state, part), part.first_BT, part.answer_BT, strict=True):
            lengths += _rounds(accepted_T, np.asarray(first_T), np.asarray(answer_T))
    return Replay(len(lengths), tuple(sum(length > level for length in lengths) for level in range(depth)))


def _rounds(accepted_T: np.ndarray, first_T: np.ndarray, answer_T: np.ndarray) -> Sequence[int]:
    """Accepted tokens of each round in a row's answers."""
    lengths = []
    for start in np.unique(first_T[answer_T]):
        answer = np.flatnonzero(answer_T & (first_T == start))
        root, last = int(answer[0]), int(answer[-1])
        while root < last:
            lengths.append(int(accepted_T[root - 1]))
            root += lengths[-1] + 1
    return lengths

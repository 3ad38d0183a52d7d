"""Replays decoding round by round on given text, to count how long the accepted chains would be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from l4jax.training.batches import Rows, batches_in, take
from l4jax.training.trainer import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class Replay:
    """Rounds of speculation, and the number of them that accepted the drafted token at each depth."""

    rounds: int
    accepted: tuple[int, ...]

    @property
    def acceptance_length(self) -> float:
        """Mean number of tokens that a round emits, as in :class:`l4jax.request.Stats`; 1 if there was no round."""
        return 1.0 + sum(self.accepted) / self.rounds if self.rounds else 1.0


def replay(trainer: Trainer, state: TrainState, rows: Rows, batch: int, depth: int) -> Replay:
    """Decode the rows' answers again with chains of ``depth`` drafted tokens, in batches of this size.

    A drafted token is accepted if it equals the text's. For text that the target has sampled, that is what decoding again at the same
    temperature and seed would accept. Tokens past the end of an answer do not count.
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

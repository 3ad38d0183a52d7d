"""What a scheduler is built for: the size of the pools, the sizes of the programs, and how long a burst may be."""

from __future__ import annotations

import dataclasses
import math

from l4jax.engine.pages import PageShape
from l4jax.engine.step import Plan
from sharding.words import counted

_MOST_PADDING = 512
"""Tokens of padding on each token rank that a piece may have if it could be shorter. So much takes a GPU less time than reading the weights
once more, which a further piece does."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Numbers are those of *each* data rank.

    ``full_pages``, ``local_pages``: sizes of the pools. ``slots``: the most rows under way. ``row_buckets``: the numbers of rows that
    decode programs are compiled for, ascending, the last equal to ``slots``. ``piece_lengths``, ``piece_rows``: the lengths and the
    numbers of rows that prefill programs are compiled for, ascending. ``piece_tokens``: the most tokens that a step prefills, padding
    included; one piece may be longer. ``most_scored``: the longest piece of a prompt that is scored, because the logits of all its tokens
    are kept. ``short_steps``: a burst's rounds while a request waits or is prefilled; ``long_steps``: otherwise.
    ``plans``: (rows, plan) pairs, as in a drafter's table; an entry holds from this number of active rows (on the fullest data rank) up to
    the next entry, and the first entry holds for fewer rows too. ``drafter``: there is a drafter, and all programs write its entries.
    ``drafts_up_to``: in a longer sequence the drafter drafts nothing.

    ``deterministic``: a request's tokens and log-probabilities are bit-equal whatever else runs. This needs one row bucket, one piece
    length, one number of piece rows and one plan. Pieces then end at multiples of the piece length, so a token's position alone decides
    which program computes the token, and where in the piece.
    """

    shape: PageShape
    full_pages: int
    local_pages: int
    slots: int
    row_buckets: tuple[int, ...]
    piece_lengths: tuple[int, ...]
    piece_rows: tuple[int, ...]
    piece_tokens: int
    short_steps: int
    long_steps: int
    data_ranks: int = 1
    plans: tuple[tuple[int, Plan | None], ...] = ((1, None),)
    drafter: bool = False
    drafts_up_to: float = math.inf
    deterministic: bool = False
    most_scored: float = math.inf

    def __post_init__(self) -> None:
        block = self.shape.block
        if self.row_buckets[-1] != self.slots:
            raise ValueError(f"row_buckets are {self.row_buckets}; expected the last to be the number of slots, {self.slots}")
        if any(plan for _, plan in self.plans) and not self.drafter:
            raise ValueError("there are plans of speculation and no drafter; expected a drafter, or no plan")
        if self.deterministic and not len(self.row_buckets) == len(self.piece_lengths) == len(self.piece_rows) == len(self.plans) == 1:
            raise ValueError(
                f"deterministic with row_buckets {self.row_buckets}, piece_lengths {self.piece_lengths}, piece_rows {self.piece_rows} and "
                f"{len(self.plans)} plans; expected one of each"
            )
        if self.deterministic and self.piece_lengths[0] % block:
            raise ValueError(
                f"deterministic with pieces of {self.piece_lengths[0]} tokens; expected a multiple of {block}, the tokens of a page on all "
                "token ranks"
            )

    @property
    def scored_lengths(self) -> tuple[int, ...]:
        """The lengths of pieces of prompts that are scored."""
        return tuple(length for length in self.piece_lengths if length <= self.most_scored)

    @property
    def grid(self) -> int:
        """Prefix hits are cut to a multiple of this many tokens."""
        return self.piece_lengths[0] if self.deterministic else self.shape.block

    @property
    def one_piece(self) -> bool:
        """Whether a step has at most one piece on all data ranks: of several the longest would decide how token ranks share them all."""
        return self.deterministic and self.data_ranks > 1 and self.shape.token_ranks > 1

    @property
    def most_burst_tokens(self) -> int:
        """The most tokens that a row may get from a burst."""
        return self.long_steps * (1 + max(plan.depth if plan else 0 for _, plan in self.plans))

    def plan(self, rows: int) -> Plan | None:
        """The plan for this many active rows on the fullest data rank."""
        fitting = [plan for least, plan in self.plans if least <= rows]
        return fitting[-1] if fitting else self.plans[0][1]

    def piece_end(self, start: int, target: int, *, scores: bool = False) -> int:
        """The end of the piece that begins at ``start``, in a prefill of ``target`` tokens. ``scores``: the prompt is scored.

        Of a long piece little is padding: where much would be, the piece ends where a shorter one is full.
        """
        if self.deterministic:
            target = min(target, start // self.grid * self.grid + self.grid)
        first = self.shape.chunk_start(start)
        if self.shape.chunk is not None and start > first:
            target = min(target, first + self.shape.chunk)
        lengths, left = self.scored_lengths if scores else self.piece_lengths, target - start
        padded = next((length for length in lengths if length >= left), lengths[-1])
        full = [length for length in lengths if length <= left]
        shorter = padded < left or (full and padded - left > _MOST_PADDING * self.shape.token_ranks)
        return start + full[-1] if shorter else target

    def piece_length(self, tokens: int) -> int:
        """What a piece of this many tokens is padded to."""
        return next(length for length in self.piece_lengths if length >= tokens)

    def most_piece_rows(self, length: int) -> int:
        """The most rows of pieces of this length that a step prefills."""
        return max((rows for rows in self.piece_rows if rows * length <= self.piece_tokens), default=self.piece_rows[0])

    def check_fits(self, tokens: int, max_length: int) -> None:
        """Raise ValueError if a request of up to ``max_length`` tokens may need more pages than there are."""
        shape, room, output = self.shape, max_length - 1, max_length - tokens
        for layers, needed, pages, size in (
            ("", room, self.full_pages, shape.block),
            (" of chunk-local layers", 0 if shape.chunk is None else min(room, shape.chunk), self.local_pages, shape.page_size),
        ):
            if needed > pages * size:
                prompt = f"a prompt of {counted(tokens, 'token')}" + (f" with up to {output:,} of output" if output > 1 else "")
                shorter = "shorten the prompt, lower max_tokens," if output > 1 else "shorten the prompt"
                raise ValueError(
                    f"{prompt} may need room for {counted(needed, 'token')} in the KV cache{layers}, which holds {pages * size:,} of one "
                    f"request ({counted(pages, 'page')} of {size}); {shorter} or load with a larger kv_tokens"
                )

"""What a scheduler is built for: the size of the pools, the programs that exist, and how long a burst may be."""

from __future__ import annotations

import dataclasses
import math

from l4jax.engine.pages import PageShape
from l4jax.engine.step import Plan


@dataclasses.dataclass(frozen=True)
class Options:
    """Numbers on *each* data rank unless they say otherwise.

    ``full_pages``, ``local_pages``: the pools. ``slots``: rows that may be under way. ``row_buckets``: the rows that decode programs are
    compiled for, ascending, up to ``slots``. ``piece_lengths`` and ``piece_rows``: those of prefill programs, ascending;
    ``piece_tokens``: the most that a step prefills, padding included, except that one piece of any length always may be.
    ``short_steps``, ``long_steps``: a burst's rounds while anyone waits or is prefilled, and otherwise. ``plans``: (rows, plan), as
    in a drafter's table: an entry applies from its number of active rows on the fullest data rank up to the next entry's, the
    first below it too. ``drafter``: there is one, and all programs make its entries. ``drafts_up_to``: tokens from which on it drafts
    nothing.

    ``deterministic``: a request's tokens and log-probabilities are bit-equal whatever else runs. This needs one row bucket,
    one piece length and number of rows, and one plan, and pieces end at multiples of the piece length, so the program that computes
    a token, and its place in it, depend on the token's position alone.
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
    def grid(self) -> int:
        """Prefix hits are multiples of it."""
        return self.piece_lengths[0] if self.deterministic else self.shape.block

    @property
    def one_piece(self) -> bool:
        """Whether a step has one piece on all data ranks together: the longest of several would decide how token ranks share them all."""
        return self.deterministic and self.data_ranks > 1 and self.shape.token_ranks > 1

    @property
    def most_burst_tokens(self) -> int:
        """The most tokens that a row may get from a burst."""
        return self.long_steps * (1 + max(plan.depth if plan else 0 for _, plan in self.plans))

    def plan(self, rows: int) -> Plan | None:
        """The plan for this many active rows on the fullest data rank."""
        fitting = [plan for least, plan in self.plans if least <= rows]
        return fitting[-1] if fitting else self.plans[0][1]

    def piece_end(self, start: int, target: int) -> int:
        """Where the piece ends that begins at ``start``, of a prefill of ``target`` tokens."""
        end = min(target, start + self.piece_lengths[-1])
        if self.deterministic:
            end = min(end, start // self.grid * self.grid + self.grid)
        first = self.shape.chunk_start(start)
        if self.shape.chunk is not None and start > first:
            end = min(end, first + self.shape.chunk)
        return end

    def piece_length(self, tokens: int) -> int:
        """What a piece of this many tokens is padded to."""
        return next(length for length in self.piece_lengths if length >= tokens)

    def most_piece_rows(self, length: int) -> int:
        """The most rows of pieces of this length that a step prefills."""
        return max((rows for rows in self.piece_rows if rows * length <= self.piece_tokens), default=self.piece_rows[0])

    def check_fits(self, tokens: int, max_length: int) -> None:
        """Raise ValueError if a request of up to ``max_length`` tokens can never have the pages that it may need."""
        shape, room = self.shape, max_length - 1
        for what, needed, there in (
            ("", shape.full_pages(room), self.full_pages),
            ("chunk-local ", shape.local_pages(0, room), self.local_pages),
        ):
            if needed > there:
                shorter = "shorten the prompt, lower max_tokens," if max_length > tokens + 1 else "shorten the prompt"
                raise ValueError(
                    f"a request of {tokens} prompt tokens, and at most {max_length} in all, may need {needed} {what}pages of the KV "
                    f"cache, and there are {there}; {shorter} or load with a larger kv_tokens"
                )

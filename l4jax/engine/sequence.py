"""One request on its way through the engine: its tokens, its slot, its pages, and how far the devices are with it."""

from __future__ import annotations

import dataclasses
import enum
import hashlib

from l4jax.engine.pages import PageShape, block_digest, digest_numbers, scope_digest


class State(enum.Enum):
    """Where a sequence is: it waits, is prefilled, decodes (a scored one: awaits its last results), waits after it was preempted; or how
    it ended."""

    WAITING = "waiting"
    PREFILL = "prefill"
    RUNNING = "running"
    PREEMPTED = "preempted"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        """Whether the sequence has ended: it owns nothing, and no later step names it."""
        return self in (State.DONE, State.CANCELLED, State.FAILED)


@dataclasses.dataclass(frozen=True, slots=True)
class Flight:
    """What a dispatched step, whose results are not known yet, may add: ``least`` to ``most`` tokens, and none from ``limit`` on."""

    step: int
    least: int
    most: int
    limit: int


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """A request as the scheduler sees it. The first five fields are the caller's; the rest is the scheduler's.

    ``request``: a number that names it, different from those of all others. ``tokens``: the prompt, to which the output is added.
    ``max_length``: the most tokens that it may have with its output. The last one is never run, so at most ``max_length`` - 1 are in
    the cache. ``scope``: requests share prefixes only within a scope; None: it neither uses nor leaves any.
    ``scores``: its prompt is run for the logits of all its positions, and nothing is generated: it ends with the results of its last
    piece. It has no drafter entries, so it can have no ``scope``, and its ``max_length`` is one more than its tokens.

    ``hit``: tokens that it found in the prefix cache. ``target``: tokens of the prefill; those of the prompt, and after a preemption
    of the output too. ``committed`` tokens are in the cache and verified: results say so. ``low`` and ``high`` bound how many are in the
    cache once everything dispatched (``flights``) has run; they differ only after a burst of speculation.

    ``full`` lists the pages of all positions; ``local`` those of each chunk that has positions from ``committed`` on, by the chunk's
    first position. ``named``: full pages that the prefix cache knows. ``saved``: its pages and its slot's state are in host memory.
    ``digests``: see :meth:`chain`.
    """

    request: int
    tokens: list[int]
    max_length: int
    scope: bytes | None = b""
    scores: bool = False
    state: State = State.WAITING
    prompt_length: int = dataclasses.field(init=False)
    arrival: int = -1
    rank: int = -1
    slot: int = -1
    target: int = 0
    hit: int = 0
    committed: int = 0
    low: int = 0
    high: int = 0
    flights: list[Flight] = dataclasses.field(default_factory=list)
    full: list[int] = dataclasses.field(default_factory=list)
    local: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    named: int = 0
    saved: bool = False
    digests: list[bytes] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        if not 0 < self.prompt_length < self.max_length:
            raise ValueError(
                f"request {self.request} has {self.prompt_length} prompt tokens and at most {self.max_length} in all; expected at least "
                "one prompt token and room for one more"
            )
        if self.scores and (self.scope is not None or self.max_length != self.prompt_length + 1):
            raise ValueError(
                f"request {self.request} is scored, with scope {self.scope!r} and at most {self.max_length} tokens; expected scope None, "
                f"for all of its tokens are computed, and {self.prompt_length + 1}, for nothing is generated"
            )

    @property
    def room(self) -> int:
        """Positions that the sequence may have in the cache."""
        return self.max_length - 1

    @property
    def decodes(self) -> bool:
        """Whether the next step may decode it: its prefill is dispatched, and it has not surely reached its most tokens.

        Never of a scored one: its prefill ends where its room does.
        """
        return self.target <= self.low < self.room

    def chain(self, shape: PageShape, ahead: int) -> list[bytes]:
        """The digests of all blocks whose tokens are known.

        With a drafter (``ahead`` 1), a block's digest also covers the token after it: the drafter's entry at a position is made
        of the next token too, so the last entry of a block is another sequence's only if that token is the same.
        """
        if self.scope is not None:
            block, tokens = shape.block, self.tokens
            parent = self.digests[-1] if self.digests else scope_digest(self.scope, tokens[:ahead])
            for start in range(len(self.digests) * block + ahead, len(tokens) - block + 1, block):
                parent = block_digest(parent, tokens[start : start + block])
                self.digests.append(parent)
        return self.digests

    def depart(self, flight: Flight) -> None:
        """Take down what a step that is being dispatched may add."""
        self.flights.append(flight)
        self._advance(flight)

    def settle(self, committed: int) -> None:
        """Take down how many tokens are in the cache after the steps whose results are known."""
        self.committed = self.low = self.high = committed
        for flight in self.flights:
            self._advance(flight)

    def update_digest(self, found: hashlib.blake2b) -> None:
        """Add all that decides what later steps do."""
        found.update(repr([getattr(self, name) for name in _SHORT]).encode())
        digest_numbers(found, self.tokens, self.full)
        for start, table in self.local.items():
            digest_numbers(found, (start,), table)
        # Each block's digest follows from the one before it.
        found.update(repr((len(self.local), len(self.digests), self.digests[-1:])).encode())

    def _advance(self, flight: Flight) -> None:
        self.low = min(flight.limit, self.low + flight.least)
        self.high = min(flight.limit, self.high + flight.most)


_SHORT = [field.name for field in dataclasses.fields(Sequence) if field.name not in ("tokens", "full", "local", "digests")]


def by_arrival(sequence: Sequence) -> int:
    """The order in which sequences are served."""
    return sequence.arrival

"""One request under way: its tokens, its slot, its pages, and how many of its tokens are computed."""

from __future__ import annotations

import dataclasses
import enum
import hashlib

from l4jax.engine.pages import PageShape, block_digest, digest_numbers, scope_digest


class State(enum.Enum):
    """Where a sequence is, or how it ended. RUNNING: it decodes; if it is scored, it awaits its last results. PREEMPTED: it waits again."""

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
    """What a step in flight may add to a sequence: ``least`` to ``most`` tokens in the cache, and none at position ``limit`` or later."""

    step: int
    least: int
    most: int
    limit: int


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """A request as the scheduler sees it. The caller gives the first five fields; the scheduler sets the rest.

    ``request``: a number of its own. ``tokens``: the prompt, to which the output is appended. ``max_length``: the most tokens of prompt and
    output together. The last one is never run, so at most ``max_length`` - 1 are in the cache. ``scope``: requests share prefixes only
    within a scope; with None it does not use the prefix cache. ``scores``: its prompt is run for the logits at all its positions, and
    nothing is generated. It has no drafter entries, so its ``scope`` is None, and its ``max_length`` is one more than its tokens.

    ``hit``: tokens that it found in the prefix cache. ``target``: tokens to prefill, the prompt and, after a preemption, the output.
    ``committed``: tokens in the cache by the results so far. ``low`` and ``high`` bound how many tokens are in the cache after all steps in
    flight (``flights``); they differ only after a burst of speculation.

    ``full`` lists the pages of all positions. ``local`` lists, by a chunk's first position, the pages of each chunk that ends after
    ``committed``. ``named``: how many blocks the prefix cache knows. ``saved``: its pages and its slot's state are in host memory.
    ``digests``: see :meth:`chain`.
    """

    request: int
    tokens: list[int]
    max_length: int
    scope: bytes | None = b""
    scores: bool = False
    guided: bool = False
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
        """The most tokens that the sequence may have in the cache."""
        return self.max_length - 1

    @property
    def decodes(self) -> bool:
        """Whether the next step may decode it: its whole prefill is dispatched, and it may still have room for a token.

        A scored sequence never decodes: its prefill ends where its room does.
        """
        return self.target <= self.low < self.room

    @property
    def awaits_token(self) -> bool:
        """Whether no step may be planned before a result is read: a guide tells which tokens may be next only when it knows the last."""
        return self.guided and bool(self.flights) and self.state is State.RUNNING

    def chain(self, shape: PageShape, ahead: int) -> list[bytes]:
        """The digests of all blocks whose tokens are known.

        With a drafter (``ahead`` 1), a block's digest also covers the token after the block. The drafter's entry at a position is made
        of the next token too, so two sequences have the same last entry in a block only if they agree on that token.
        """
        if self.scope is not None:
            block, tokens = shape.block, self.tokens
            parent = self.digests[-1] if self.digests else scope_digest(self.scope, tokens[:ahead])
            for start in range(len(self.digests) * block + ahead, len(tokens) - block + 1, block):
                parent = block_digest(parent, tokens[start : start + block])
                self.digests.append(parent)
        return self.digests

    def depart(self, flight: Flight) -> None:
        """Note what a step that is being dispatched may add."""
        self.flights.append(flight)
        self._advance(flight)

    def settle(self, committed: int) -> None:
        """Note how many tokens are in the cache by the results so far."""
        self.committed = self.low = self.high = committed
        for flight in self.flights:
            self._advance(flight)

    def update_digest(self, found: hashlib.blake2b) -> None:
        """Add everything that later steps depend on."""
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

"""One data rank's slots and pages, and which of them each of its sequences holds."""

from __future__ import annotations

import bisect
import hashlib
import heapq
from collections import Counter

from l4jax.engine.options import Options
from l4jax.engine.pages import PagePool, Pages
from l4jax.engine.sequence import Sequence, State, by_arrival
from l4jax.engine.step import PageOnRank


class DataRank:
    """The rank ``number`` along ``data``.

    ``active``: its sequences under way, in order of arrival; ``zero_full``, ``zero_local``: pages that the next step must zero.
    """

    def __init__(self, number: int, options: Options) -> None:
        self.number = number
        self.options = options
        self.pool = PagePool(options.shape, options.full_pages, options.local_pages, options.grid)
        self.active: list[Sequence] = []
        self.zero_full: list[PageOnRank] = []
        self.zero_local: list[PageOnRank] = []
        self._ahead = int(options.drafter)
        self._slots = [*range(number * options.slots, (number + 1) * options.slots)]

    @property
    def has_slot(self) -> bool:
        """Whether a sequence can be admitted."""
        return bool(self._slots)

    def prefix(self, sequence: Sequence) -> int:
        """How many of the sequence's tokens are cached here; never all, because the last one's logits give the first output token."""
        if sequence.scope is None:
            return 0
        grid = self.options.grid
        return self.pool.hit(sequence.chain(self.options.shape, self._ahead), (len(sequence.tokens) - 1) // grid * grid)

    def is_writing(self, sequence: Sequence, hit: int) -> bool:
        """Whether another sequence's prefill here will lengthen this one's hit when its results are read."""
        end = hit + self.options.grid
        if end >= len(sequence.tokens) or sequence.scope is None:
            return False
        block = end // self.options.shape.block - 1
        digest = sequence.digests[block]
        # With a drafter the writer's last block has no digest before the token after it is known, and cannot be waited for.
        return any(
            s.committed < s.target and s.named <= block < len(s.digests) and end <= s.target and s.digests[block] == digest
            for s in self.active
        )

    def admit(self, sequence: Sequence, hit: int) -> bool:
        """Give a sequence a slot, the pages of its ``hit`` cached tokens, and those for its other tokens and one burst; or nothing."""
        full, local = self.pool.hold(sequence.digests, hit)
        if not self._enter(sequence, full, local, 0, self.options.shape.chunk_start(hit)):
            return False
        sequence.state, sequence.hit, sequence.target = State.PREFILL, hit, len(sequence.tokens)
        sequence.named = hit // self.options.shape.block
        sequence.settle(hit)
        return True

    def readmit(self, sequence: Sequence) -> bool:
        """Give a saved sequence a slot, and pages for what was saved and for one burst; or nothing."""
        shape, length = self.options.shape, sequence.committed
        start = shape.chunk_start(length)
        if not self._enter(sequence, [], [], shape.local_pages(start, length), start):
            return False
        sequence.state = State.RUNNING
        return True

    def _enter(self, sequence: Sequence, full: list[int], local: list[int], local_count: int, start: int) -> bool:
        shape, end = self.options.shape, min(len(sequence.tokens) + self.options.most_burst_tokens, sequence.room)
        # Local pages are taken chunk by chunk. But a sequence that cannot have a whole chunk's would only be preempted again.
        chunk_fits = len(local) + self.pool.local.available >= shape.local_pages(0, end)
        if not chunk_fits or not self.pool.grow(full, shape.full_pages(end), local, local_count):
            self.pool.full.shorten(full, 0)
            self.pool.local.shorten(local, 0)
            return False
        sequence.full, sequence.local = full, {start: local} if local else {}
        sequence.slot = heapq.heappop(self._slots)
        sequence.rank = self.number
        bisect.insort(self.active, sequence, key=by_arrival)
        return True

    def grow(self, sequence: Sequence, start: int, end: int) -> bool:
        """Give a sequence the pages for all positions before ``end``, whose last chunk begins at ``start``; or none."""
        shape = self.options.shape
        local = sequence.local.get(start, [])
        if not self.pool.grow(sequence.full, shape.full_pages(end), local, shape.local_pages(start, end)):
            return False
        if local:
            sequence.local[start] = local
        return True

    def settle(self, sequence: Sequence) -> None:
        """Give verified pages to the prefix cache, and take back those that neither the sequence nor a step in flight needs."""
        shape, pool = self.options.shape, self.pool
        self._name(sequence)
        for start in [start for start in sequence.local if start + (shape.chunk or 0) <= sequence.committed]:
            pool.local.shorten(sequence.local.pop(start), 0)
        if sequence.state is State.RUNNING and sequence.committed >= sequence.target:
            pool.full.shorten(sequence.full, shape.full_pages(sequence.high))
            for start, table in sequence.local.items():
                pool.local.shorten(table, shape.local_pages(start, max(start, sequence.high)))

    def _name(self, sequence: Sequence) -> None:
        options, block = self.options, self.options.shape.block
        end = min(sequence.committed, sequence.target) if options.deterministic else sequence.committed
        before, end = sequence.named * block, end // options.grid * options.grid
        if end <= before or sequence.scope is None:
            return
        digests = sequence.chain(options.shape, self._ahead)
        for i in range(sequence.named, end // block):
            self.pool.full.name(sequence.full[i], (digests[i], (i + 1) * block))
        for start, table in sequence.local.items():
            for page, page_end in zip(table, options.shape.local_ends(start, end), strict=False):
                if page_end > before:
                    self.pool.local.name(page, (digests[(page_end - 1) // block], page_end))
        sequence.named = end // block

    def release(self, sequence: Sequence, *, unsure: bool) -> None:
        """Take everything back from a sequence.

        ``unsure``: a step whose results do not count may have written after the committed tokens; the next step zeroes those pages.
        """
        shape = self.options.shape
        self._give_back(sequence, self.pool.full, sequence.full, 0, shape.block, self.zero_full if unsure else [])
        for start, table in sequence.local.items():
            self._give_back(sequence, self.pool.local, table, start, shape.page_size, self.zero_local if unsure else [])
        sequence.local.clear()
        heapq.heappush(self._slots, sequence.slot)
        sequence.slot = sequence.rank = -1
        self.active.remove(sequence)

    def _give_back(self, sequence: Sequence, pages: Pages, table: list[int], start: int, size: int, zero: list[PageOnRank]) -> None:
        while table:
            page, begin = table.pop(), start + len(table) * size
            if pages.release(page) and begin < sequence.high and sequence.committed < begin + size:
                zero.append((self.number, page))

    def update_digest(self, found: hashlib.blake2b) -> None:
        """Add everything that later calls depend on, apart from the sequences."""
        found.update(repr((self._slots, self.zero_full, self.zero_local)).encode())
        self.pool.full.update_digest(found)
        self.pool.local.update_digest(found)

    def check(self) -> None:
        """Raise AssertionError unless every slot and page is accounted for: each reference is an entry of one sequence's table."""
        slots, own = self.options.slots, self.active
        first = self.number * slots
        assert sorted([*self._slots, *(s.slot for s in own)]) == [*range(first, first + slots)], "slots are lost or doubled"
        tables = [s.full for s in own], [table for s in own for table in s.local.values()]
        for pages, lists in zip((self.pool.full, self.pool.local), tables, strict=True):
            pages.check()
            uses = Counter(page for table in lists for page in table)
            assert all(uses[page] == pages.references(page) for page in range(pages.count)), "references and tables differ"

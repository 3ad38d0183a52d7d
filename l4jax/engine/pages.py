"""Pages of the KV cache: which are free, who uses them, and which hold a prefix that a later request can use.

Each rank along ``data`` has a :class:`PagePool` of two kinds of pages. A *full* page is one of the layers that keep everything. It holds
page size tokens on each token rank, together a *block*. A *local* page is one of the chunk-local layers. It holds page size tokens of one
attention chunk; a chunk is whole on one token rank, and page ``i`` is reserved on every rank. The drafter's cache has as many pages of
each kind, and its page ``i`` always belongs to the sequences that have the model's page ``i``. One table addresses both, and they are
shared, evicted and returned together.

A page is free, cached or used. A used page has references: one for each sequence whose table lists it. A cached page has none, but a
key says what it holds. It is evicted only when no page is free, the least recently used first. Keys are hash chains
(:func:`block_digest`), so two sequences have the same key only if all their tokens up to there are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

Key = tuple[bytes, int]
"""A page's contents: the digest of the block in which its last token is, and the position after that token."""


def scope_digest(scope: bytes, tokens: Sequence[int]) -> bytes:
    """The parent of the first block's digest: it covers the request's scope, and the tokens before the first block's, if any."""
    return block_digest(hashlib.blake2b(scope, digest_size=32).digest(), tokens)


def block_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a block's tokens and of its ``parent``, the digest of the block before it; 32 bytes, as ``parent``."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=32).digest()


def digest_numbers(found: hashlib.blake2b, *lists: Iterable[int]) -> None:
    """Add lists of numbers to a digest, each with its length; fast, because a list may have a number for each page."""
    for numbers in lists:
        packed = array("q", numbers).tobytes()
        found.update(len(packed).to_bytes(8))
        found.update(packed)


@dataclasses.dataclass(frozen=True)
class PageShape:
    """How tokens are laid out in pages: a page's tokens, the ranks that share a sequence's tokens, and the attention chunk, if any."""

    page_size: int
    token_ranks: int = 1
    chunk: int | None = None

    @property
    def block(self) -> int:
        """Tokens of a full page on all token ranks."""
        return self.page_size * self.token_ranks

    def full_pages(self, end: int) -> int:
        """Full pages that positions before ``end`` need."""
        return -(-end // self.block)

    def chunk_start(self, position: int) -> int:
        """The first position of the attention chunk that ``position`` is in; 0 without chunks."""
        return 0 if self.chunk is None else position // self.chunk * self.chunk

    def local_pages(self, start: int, end: int) -> int:
        """Local pages that the positions before ``end`` need, of the chunk that begins at ``start``."""
        return 0 if self.chunk is None else -(-(min(end, start + self.chunk) - start) // self.page_size)

    def local_ends(self, start: int, end: int) -> range:
        """The ends of the local pages that hold only positions before ``end``, of the chunk that begins at ``start``."""
        if self.chunk is None:
            return range(0)
        return range(start + self.page_size, min(end, start + self.chunk) + 1, self.page_size)


class Pages:
    """The pages of one kind on one data rank. Every operation takes constant time for each page that it changes."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._references = [0] * count
        self._key: list[Key | None] = [None] * count
        self._by_key: dict[Key, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    @property
    def available(self) -> int:
        """How many pages :meth:`take` can return: the free and the cached ones."""
        return len(self._free) + len(self._cached)

    def references(self, page: int) -> int:
        """How many sequences use this page."""
        return self._references[page]

    def take(self, count: int) -> list[int] | None:
        """Take this many pages, with one reference each; evicts cached ones if it must. If there are too few, takes none, returns None."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                key, self._key[page] = self._key[page], None
                assert key is not None
                del self._by_key[key]
            self._references[page] = 1
            pages.append(page)
        return pages

    def find(self, key: Key) -> int | None:
        """The page with these contents, if one is used or cached."""
        return self._by_key.get(key)

    def hold(self, page: int) -> None:
        """Add a reference to a page that is used or cached."""
        if self._references[page] == 0:
            del self._cached[page]
        self._references[page] += 1

    def release(self, page: int) -> bool:
        """Drop a reference; True if the page is free now, False if it is still used or is cached."""
        self._references[page] -= 1
        assert self._references[page] >= 0
        if self._references[page] > 0:
            return False
        if self._key[page] is None:
            self._free.append(page)
            return True
        self._cached[page] = None
        return False

    def shorten(self, table: list[int], count: int) -> None:
        """Drop the references to all but the first ``count`` pages of a table, the last page first: it is the first to be evicted."""
        while len(table) > count:
            self.release(table.pop())

    def name(self, page: int, key: Key) -> None:
        """Give a used page the key of what it holds. If another page has this key, or this one has a key, nothing changes."""
        assert self._references[page] > 0
        if key not in self._by_key and self._key[page] is None:
            self._by_key[key], self._key[page] = page, key

    def check(self) -> None:
        """Raise AssertionError unless each page is in exactly one of free, cached and used, and has a key where it must."""
        used = {page for page in range(self.count) if self._references[page] > 0}
        assert len(self._free) + len(self._cached) + len(used) == self.count, "free + cached + used are not all pages"
        assert len({*self._free, *self._cached, *used}) == self.count, "a page is in two places"
        assert all(self._key[page] is None for page in self._free), "a free page has a key"
        assert all(self._key[page] is not None for page in self._cached), "a cached page has no key"
        assert {key: page for page, key in enumerate(self._key) if key is not None} == self._by_key, "keys and pages differ"

    def update_digest(self, found: hashlib.blake2b) -> None:
        """Add everything that the results of later calls depend on."""
        ends = (end for _, end in self._by_key)
        digest_numbers(found, self._free, self._cached, self._references, self._by_key.values(), ends)
        found.update(b"".join(digest for digest, _ in self._by_key))


class PagePool:
    """The full and the local pages of one data rank, and the prefixes that they hold.

    ``grid``: hits are cut to a multiple of this many tokens, which is itself a multiple of the block.
    """

    def __init__(self, shape: PageShape, full: int, local: int, grid: int) -> None:
        self.shape = shape
        self.full = Pages(full)
        self.local = Pages(local)
        self.grid = grid

    def grow(self, full: list[int], full_count: int, local: list[int], local_count: int) -> bool:
        """Lengthen a sequence's tables to at least these numbers of pages; if there are too few, change nothing and return False."""
        if full_count <= len(full) and local_count <= len(local):
            return True
        more_full = self.full.take(max(0, full_count - len(full)))
        if more_full is None:
            return False
        more_local = self.local.take(max(0, local_count - len(local)))
        if more_local is None:
            self.full.shorten(more_full, 0)
            return False
        full += more_full
        local += more_local
        return True

    def hit(self, digests: Sequence[bytes], most: int) -> int:
        """The tokens, at most ``most``, of the longest prefix that can be used, given the digests of its blocks.

        A prefix needs all its full pages, and the local pages of the chunk that its end is in. It ends where a local page ends, because
        a half full page would be written while it is shared. At a chunk's boundary it needs no local page.
        """
        blocks, block = 0, self.shape.block
        while (blocks + 1) * block <= most and self.full.find((digests[blocks], (blocks + 1) * block)) is not None:
            blocks += 1
        length = blocks * block // self.grid * self.grid
        while (whole := self._whole(digests, length)) < length:
            length = whole // self.grid * self.grid
        return length

    def _whole(self, digests: Sequence[bytes], length: int) -> int:
        """The end of the local pages that a hit of this length could use; its length, if they are all there."""
        if self.shape.chunk is None:
            return length
        whole = self.shape.chunk_start(length)
        for key in self._local_keys(digests, length):
            if self.local.find(key) is None:
                break
            whole = key[1]
        return whole

    def hold(self, digests: Sequence[bytes], length: int) -> tuple[list[int], list[int]]:
        """Add a reference to the full and to the local pages of a prefix that :meth:`hit` found."""
        block = self.shape.block
        full = [self._held(self.full, (digests[i], (i + 1) * block)) for i in range(length // block)]
        return full, [self._held(self.local, key) for key in self._local_keys(digests, length)]

    @staticmethod
    def _held(pages: Pages, key: Key) -> int:
        page = pages.find(key)
        assert page is not None
        pages.hold(page)
        return page

    def _local_keys(self, digests: Sequence[bytes], length: int) -> list[Key]:
        ends = self.shape.local_ends(self.shape.chunk_start(length), length)
        return [(digests[(end - 1) // self.shape.block], end) for end in ends]

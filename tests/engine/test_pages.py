"""Pages: references, the order of eviction, and prefixes found by their tokens."""

from __future__ import annotations

import pytest

from l4jax.engine.pages import PagePool, Pages, PageShape, block_digest, scope_digest


def test_a_page_is_free_used_or_cached():
    pages = Pages(3)
    assert pages.take(2) == [0, 1]
    pages.name(0, (b"x", 4))
    assert [pages.release(0), pages.release(1)] == [False, True]
    assert (pages.find((b"x", 4)), pages.available) == (0, 3)
    pages.check()
    pages.hold(0)
    pages.hold(0)
    assert (pages.references(0), pages.available) == (2, 2)
    assert pages.take(3) is None
    assert pages.take(2) == [1, 2]
    assert [pages.release(0), pages.release(0)] == [False, False]
    pages.check()


def test_the_least_recently_used_page_is_evicted_first_and_only_when_none_is_free():
    pages = Pages(4)
    for page, key in zip(pages.take(3), (b"a", b"b", b"c"), strict=True):
        pages.name(page, (key, 1))
    pages.shorten([0, 1, 2], 0)  # the last of a chain goes first: without its parent it could not be found
    pages.hold(2)
    pages.release(2)  # used again
    assert pages.take(1) == [3]
    assert pages.take(1) == [1]
    assert [pages.find((key, 1)) for key in (b"a", b"b", b"c")] == [0, None, 2]
    assert pages.take(2) == [0, 2]
    pages.check()


def test_a_key_names_one_page_and_a_page_has_one_key():
    pages = Pages(2)
    pages.take(2)
    pages.name(0, (b"a", 1))
    pages.name(1, (b"a", 1))
    pages.name(0, (b"b", 1))
    assert (pages.find((b"a", 1)), pages.find((b"b", 1))) == (0, None)
    assert [pages.release(0), pages.release(1)] == [False, True]
    pages.check()


def test_tables_grow_together_or_not_at_all():
    pool = PagePool(PageShape(4, chunk=8), full=4, local=1, grid=4)
    full, local = [], []
    assert pool.grow(full, 2, local, 1) and (full, local) == ([0, 1], [0])
    assert not pool.grow(full, 3, local, 2)
    assert not pool.grow(full, 5, local, 1)
    assert (full, local, pool.full.available) == ([0, 1], [0], 2)


@pytest.mark.parametrize(
    ("page_size", "token_ranks", "chunk", "grid", "full", "local", "hits"),
    [
        # Hits of prefixes of 0, 1, 2 ... blocks that are cached; local pages by the position where they end.
        (4, 1, None, 4, 5, (), [0, 4, 8, 12, 16, 20]),
        (2, 2, None, 4, 5, (), [0, 4, 8, 12, 16, 20]),
        (4, 1, None, 8, 5, (), [0, 0, 8, 8, 16, 16]),
        (4, 1, 8, 4, 5, (), [0, 0, 8, 8, 16, 16]),  # without local pages: up to a chunk's boundary
        (4, 1, 8, 4, 5, (4, 12, 20), [0, 4, 8, 12, 16, 20]),
        (4, 1, 16, 4, 5, (4, 12), [0, 4, 4, 4, 16, 16]),  # the page that ends at 8 is missing, so 12 cannot be used either
        (4, 1, 16, 4, 5, (4, 8, 12, 16, 20), [0, 4, 8, 12, 16, 20]),
        (4, 1, 2, 4, 5, (), [0, 4, 8, 12, 16, 20]),  # every block ends at a chunk's boundary
        (4, 1, 6, 4, 5, (4, 10, 16), [0, 4, 4, 12, 16, 16]),  # 8 is in the middle of the page of 6 to 10
        (2, 2, 8, 4, 5, (2, 4, 10, 18, 20), [0, 4, 8, 8, 16, 20]),
    ],
)
def test_a_hit_needs_all_full_pages_and_whole_local_pages_of_its_last_chunk(page_size, token_ranks, chunk, grid, full, local, hits):
    shape = PageShape(page_size, token_ranks, chunk)
    digests = [scope_digest(b"", [])]
    for i in range(full):
        digests.append(block_digest(digests[-1], [i] * shape.block))
    del digests[0]
    found = []
    for blocks in range(full + 1):
        pool = PagePool(shape, full, 8, grid)
        for i, page in enumerate(pool.full.take(blocks)):
            pool.full.name(page, (digests[i], (i + 1) * shape.block))
        for end, page in zip(local, pool.local.take(len(local)), strict=True):
            pool.local.name(page, (digests[(end - 1) // shape.block], end))
        length = pool.hit(digests, full * shape.block)
        held, held_local = pool.hold(digests, length)
        assert len(held) * shape.block == length
        assert len(held_local) * page_size == (length % chunk if chunk else 0)
        found.append(length)
    assert found == hits


def test_digests_tell_tokens_their_order_their_scope_and_their_parents_apart():
    root = scope_digest(b"", [])
    digests = [
        block_digest(root, [1, 2]),
        block_digest(root, [2, 1]),
        block_digest(scope_digest(b"a", []), [1, 2]),
        block_digest(scope_digest(b"", [1]), [1, 2]),
        block_digest(block_digest(root, [0, 0]), [1, 2]),
    ]
    assert len(set(digests)) == len(digests)
    assert digests[0] == block_digest(scope_digest(b"", []), [1, 2])

"""The KV cache: pages of keys and values, at two sizes.

Layers with chunk-local attention (Llama 4's RoPE layers) never attend to keys before their current chunk, so they keep one
chunk: the key at position ``i`` is in slot ``i % attention_chunk_size``, and the keys that a query may see fill the slots
from 0 up without a gap. All other layers keep everything: slot ``i`` is position ``i``. Page tables address both, one table
for each kind of layer: slot ``s`` of row ``b`` is token ``s % page_size`` of page ``table[b, s // page_size]``.

The keys of several tokens are attended before they are written (see ``model.steps``). So a step's tokens may cross a chunk boundary
although the cache holds only one chunk. If each row has one new token (decoding), its key is written first and attended in its page: it
overwrites no key that the token sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from l4jax.config import ModelConfig
from l4jax.parallel.arrays import host_array
from pallas_kernels.heads import Pools, Targets, put
from sharding.mesh import MeshSpec

PAGE_SIZE = 128
"""Tokens in a page."""

CACHE_AXES = ("pages", "kv_heads", None, "head_dim")
"""The logical axes of a layer's keys and of its values."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache(Pools):
    """One layer's pools, [pages, KV heads, page size, head dim] each; pages can be zeroed."""

    def zeroed(self, page_W: Int32[Array, "W"]) -> LayerCache:
        """The cache with zeros in these pages; a number past the last page changes nothing."""
        return jax.tree.map(lambda pool_PKph: pool_PKph.at[page_W].set(0, mode="drop"), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TreeCache:
    """One layer's cache, and beside it the keys and values of a draft tree's nodes."""

    layer: LayerCache
    k_BSKh: Float[Array, "B S K h"]
    v_BSKh: Float[Array, "B S K h"]

    @classmethod
    def around(cls, layer: LayerCache, rows: int) -> TreeCache:
        """Start with the cache of ``rows`` sequences and no nodes."""
        _, K, _, h = layer.k_PKph.shape
        nothing = jnp.zeros((rows, 0, K, h), layer.k_PKph.dtype)
        return cls(layer, nothing, nothing)

    def extended(self, k_BNKh: Float[Array, "B N K h"], v_BNKh: Float[Array, "B N K h"]) -> TreeCache:
        """Append the keys and values of more nodes."""
        return TreeCache(self.layer, jnp.concatenate([self.k_BSKh, k_BNKh], axis=1), jnp.concatenate([self.v_BSKh, v_BNKh], axis=1))

    def accepted(self, node_BT: Int32[Array, "B T"], pages_BW: Int32[Array, "B W"], slot_BT: Int32[Array, "B T"]) -> LayerCache:
        """Write these nodes to these slots of the cache (as in :func:`write`) and forget the other nodes."""
        k_BTKh, v_BTKh = (jnp.take_along_axis(a, node_BT[:, :, None, None], axis=1) for a in (self.k_BSKh, self.v_BSKh))
        return write(self.layer, k_BTKh, v_BTKh, pages_BW, slot_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTables:
    """The pages that hold each row's slots, for the layers that keep everything and for the chunk-local layers.

    ``rows_apart``: what a row reads from them must be the same to the last bit whatever the other rows are.
    """

    full_BW: Int32[Array, "B W"]
    local_Bw: Int32[Array, "B w"]
    rows_apart: bool = dataclasses.field(default=False, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """The slots and pages of each rank along ``data``.

    A full page holds PAGE_SIZE tokens on each rank that shares a sequence's tokens, in the layers that keep everything (see
    :func:`rank_of`). A local page holds PAGE_SIZE tokens of one attention chunk, in the chunk-local layers: chunks go to the token ranks
    in turn, each whole to one, so page ``i`` is reserved on every one of them.
    """

    slots: int
    full_pages: int
    local_pages: int

    @classmethod
    def for_rows(cls, config: ModelConfig, rows: int, capacity: int, spec: MeshSpec) -> CacheShape:
        """Room for ``rows`` sequences of up to ``capacity`` tokens each, spread evenly over the data ranks."""
        slots, chunk = -(-rows // spec.data), config.attention_chunk_size
        full = -(-capacity // (PAGE_SIZE * spec.token_ranks.count))
        local = 0 if chunk is None else -(-min(capacity, chunk) // PAGE_SIZE)
        return cls(slots, slots * full, slots * local)

    def identity_tables(self, rows: Sequence[int] | np.ndarray) -> PageTables:
        """Page tables (host arrays) that give row ``rows[i]``, counted on its own data rank, its even share of pages, all consecutive."""

        def table(pages: int) -> Array:
            width = pages // self.slots
            return host_array(np.asarray(rows)[:, None] * width + np.arange(width)[None, :], np.int32)

        return PageTables(table(self.full_pages), table(self.local_pages))

    def layer_shapes(self, config: ModelConfig, spec: MeshSpec) -> list[tuple[int, int, int, int]]:
        """The shape of each layer's pool of keys, over all ranks, which is also that of its pool of values."""
        ranks = spec.data * spec.token_ranks.count
        pages = [self.local_pages if is_local(config, i) else self.full_pages for i in range(config.num_layers)]
        return [(ranks * n, config.num_kv_heads, PAGE_SIZE, config.head_dim) for n in pages]


def is_local(config: ModelConfig, layer: int) -> bool:
    """Whether the layer's attention is confined to chunks."""
    return config.attention_chunk_size is not None and config.rope_layers[layer]


def rank_of(position: Int32[Array, "*B"], ranks: int, chunk: int | None) -> Int32[Array, "*B"]:
    """The token rank that caches this position. Ranks take turns by attention chunks, or by pages in layers that keep everything.

    So ranks' caches fill up evenly, and a chunk-local layer finds its whole chunk on one rank.
    """
    return position // (chunk or PAGE_SIZE) % ranks


def slot_of(position: Int32[Array, "*B"], ranks: int, chunk: int | None) -> Int32[Array, "*B"]:
    """The slot of this position on the rank that caches it."""
    if chunk is not None:
        return position % chunk
    return position // (PAGE_SIZE * ranks) * PAGE_SIZE + position % PAGE_SIZE


def slots_before(position: Int32[Array, "*B"], rank: Int32[Array, ""], ranks: int) -> Int32[Array, "*B"]:
    """How many of a rank's slots hold earlier positions, in a layer that keeps everything."""
    page = position // PAGE_SIZE
    whole = (page - rank + ranks - 1) // ranks * PAGE_SIZE
    return whole + jnp.where(page % ranks == rank, position % PAGE_SIZE, 0)


def read(cache: LayerCache, pages_BW: Int32[Array, "B W"]) -> tuple[Float[Array, "B S K h"], Float[Array, "B S K h"]]:
    """Gather the keys and values of whole pages, one page after the other."""

    def gather(pool_PKph: Array) -> Array:
        pages_BWpKh = jnp.swapaxes(pool_PKph[pages_BW], 2, 3)
        return pages_BWpKh.reshape(pages_BW.shape[0], -1, *pages_BWpKh.shape[3:])

    return gather(cache.k_PKph), gather(cache.v_PKph)


def write(
    cache: LayerCache,
    k_BTKh: Float[Array, "B T K h"],
    v_BTKh: Float[Array, "B T K h"],
    pages_BW: Int32[Array, "B W"],
    slot_BT: Int32[Array, "B T"],
) -> LayerCache:
    """Write new keys and values to their slots; a slot of -1 means that the token is not kept."""
    return put(cache, k_BTKh, v_BTKh, targets(cache, pages_BW, slot_BT))


def targets(cache: LayerCache, pages_BW: Int32[Array, "B W"], slot_BT: Int32[Array, "B T"]) -> Targets:
    """The page and the place in it of each slot; a page past the last one for a slot of -1."""
    page_BT = jnp.take_along_axis(pages_BW, jnp.maximum(slot_BT, 0) // PAGE_SIZE, axis=1)
    return Targets(jnp.where(slot_BT >= 0, page_BT, cache.k_PKph.shape[0]), slot_BT % PAGE_SIZE)

"""Sizes the KV cache: as many pages as asked for, or as many as memory allows."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array

from l4jax.cache import PAGE_SIZE, CacheShape
from l4jax.parallel.placement import DrafterPlacement, Placement
from l4jax.program_inputs import Resident
from sharding import hosts
from sharding.words import counted

_CPU_SHARE = 0.25
"""On CPUs, the part of the free memory that a cache takes by default: other programs need memory too."""
_GPU_SHARE = 0.97
"""On GPUs, the part of the memory beside weights and programs that a cache takes by default: some is lost between allocations."""
_GPU_TRIAL_SHARE = 0.9
"""On GPUs, the part of the memory beside the weights that a trial cache takes, for which programs are compiled to see what they need."""
_SIGNIFICANT_BITS = 3
"""To how many binary digits a default size is rounded down on CPUs."""


class CacheMemory:
    """Sizes the cache of a model, and of its drafter if there is one, for ``slots`` sequences on each data rank."""

    def __init__(self, placement: Placement, drafter: DrafterPlacement | None, dtype: jnp.dtype, slots: int) -> None:
        self._placement, self._drafter, self._dtype, self._slots = placement, drafter, dtype, slots
        self._device = placement.mesh.local_devices[0]
        self._ranks = placement.spec.token_ranks.count

    def shape(self, kv_tokens: int | None, weights: Iterable[Array], program_bytes: Callable[[CacheShape], int]) -> CacheShape:
        """A cache of ``kv_tokens`` tokens of all sequences together; if None, of what memory allows, up to the context in each slot.

        ``program_bytes``: returns what programs need on a device beside the weights and a cache of this shape. It is called on GPUs
        if ``kv_tokens`` is None. Raises ValueError if the cache does not fit beside the weights.
        """
        available = self.available_bytes(weights)
        if kv_tokens is not None:
            return self._asked_for(kv_tokens, available)
        if self._device.platform == "cpu":
            return self._largest(available * _CPU_SHARE, rounded=True)
        trial = self._largest(available * _GPU_TRIAL_SHARE)
        return self._largest((available - max(map(int, hosts.share(str(program_bytes(trial)))))) * _GPU_SHARE)

    def check(self, kv_tokens: int | None, weights: Iterable[jax.ShapeDtypeStruct]) -> None:
        """Raise ValueError, before the weights are there, if :meth:`shape` is sure to."""
        available = self.available_bytes(weights)
        if kv_tokens is None:
            self._check_smallest(available * (_CPU_SHARE if self._device.platform == "cpu" else _GPU_SHARE))
        else:
            self._asked_for(kv_tokens, available)

    def _asked_for(self, kv_tokens: int, available: float) -> CacheShape:
        """Room for this many tokens of all sequences together. Raises ValueError if that is more than there is memory for."""
        shape = self._shape_for(-(-kv_tokens // self._placement.spec.data))
        needed = self._cache_bytes(shape)
        if needed > available:
            raise ValueError(
                f"{self._described(kv_tokens)} takes {needed / 1e9:,.1f} GB, and beside the weights this device has "
                f"{available / 1e9:,.1f} GB; lower kv_tokens or max_batch, or use more devices"
            )
        return shape

    def _check_smallest(self, budget: float) -> None:
        """Raise ValueError if a cache with one page on each rank takes more than this many bytes."""
        block = PAGE_SIZE * self._ranks
        if (smallest := self._cache_bytes(self._shape_for(block))) > budget:
            raise ValueError(
                f"{self._described(block * self._placement.spec.data)} takes {smallest / 1e9:,.1f} GB, and may take "
                f"{max(budget, 0) / 1e9:,.1f} GB beside the weights; lower max_batch, use more devices, or set kv_tokens"
            )

    def _described(self, tokens: int) -> str:
        rows = self._slots * self._placement.spec.data
        return f"a KV cache of {counted(tokens, 'token')} for {counted(rows, 'row')} (max_batch)"

    def _largest(self, budget: float, *, rounded: bool = False) -> CacheShape:
        """The largest cache that takes no more than this many bytes, up to the context in each slot.

        ``rounded``: if the context does not fit in each slot, round the number of pages down to ``_SIGNIFICANT_BITS`` binary digits. Free
        memory changes from process to process; with the same number of pages a process can load the programs of an earlier one.
        """
        block = PAGE_SIZE * self._ranks
        pages, wanted = 1, self._slots * -(-self._placement.config.max_position_embeddings // block)
        self._check_smallest(budget)
        most = wanted
        while pages < most:
            middle = (pages + most + 1) // 2
            pages, most = (middle, most) if self._cache_bytes(self._shape_for(middle * block)) <= budget else (pages, middle - 1)
        if rounded and pages < wanted:
            pages -= pages % (1 << max(0, pages.bit_length() - _SIGNIFICANT_BITS))
        return self._shape_for(pages * block)

    def abstract(self, shape: CacheShape) -> Resident:
        """What stays on the devices with a cache of this shape, as shapes, dtypes and shardings."""
        return Resident.abstract(self._placement, self._drafter, shape, self._dtype)

    def _shape_for(self, tokens: int) -> CacheShape:
        """A cache of this many tokens on each data rank."""
        full = -(-tokens // (PAGE_SIZE * self._ranks))
        chunk = self._placement.config.attention_chunk_size
        # Two chunks for each slot: a sequence begins a chunk while a step in flight still reads the one before it.
        local = 0 if chunk is None else min(full * self._ranks, 2 * self._slots * -(-chunk // PAGE_SIZE))
        return CacheShape(self._slots, full, local)

    def _cache_bytes(self, shape: CacheShape) -> int:
        leaves: list[jax.ShapeDtypeStruct] = jax.tree.leaves(self.abstract(shape))
        if self._device.platform == "cpu":  # all of its devices share the machine's memory
            return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        return _bytes_on_a_device(leaves)

    def available_bytes(self, weights: Iterable[Array | jax.ShapeDtypeStruct]) -> float:
        """The memory beside the weights, in bytes, of the process's devices that have least. Raises ValueError if weights do not fit."""
        held = 0 if self._device.platform == "cpu" else _bytes_on_a_device(weights)  # a CPU's free memory has the weights already
        available = min(map(float, hosts.share(str(own_memory_bytes(self._device) - held))))
        if available <= 0 < held:
            raise ValueError(
                f"the weights take {held / 1e9:,.1f} GB of each device, which has {(available + held) / 1e9:,.1f} GB; use more devices, or "
                "a dtype that takes less memory"
            )
        return available


def _bytes_on_a_device(leaves: Iterable[Array | jax.ShapeDtypeStruct]) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def own_memory_bytes(device: jax.Device) -> float:
    """The memory of this process's device, in bytes; of a CPU what is free."""
    return free_bytes() if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit", math.inf)


def free_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the machine, or a container with a limit, has free or could free; all of its memory where the system does not say."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        available = re.search(r"^MemAvailable: *(\d+) kB$", meminfo.read_text(), re.MULTILINE)
        free = free if available is None else int(available[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no limit is "max"
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        files = re.search(r"^inactive_file (\d+)$", (cgroup / "memory.stat").read_text(), re.MULTILINE)
        free = min(free, limit - used + (0 if files is None else int(files[1])))
    return free

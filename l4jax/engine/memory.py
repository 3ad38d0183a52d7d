"""How many pages the KV cache has: as many as asked for, or what memory allows."""

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

_CPU_SHARE = 0.25
"""The part of a machine's free memory that a cache takes on CPUs unless told otherwise: the machine is not ours alone."""
_GPU_SHARE = 0.97
"""The part of a GPU's memory beside weights and programs that a cache takes unless told otherwise: some is lost between allocations."""
_GPU_GUESS = 0.9
"""The part of a GPU's memory beside the weights that a cache takes while it is found out what programs need beside it."""


class CacheMemory:
    """Sizes the cache of a model, and of its drafter if there is one, for ``slots`` sequences on each data rank."""

    def __init__(self, placement: Placement, drafter: DrafterPlacement | None, dtype: jnp.dtype, slots: int) -> None:
        self._placement, self._drafter, self._dtype, self._slots = placement, drafter, dtype, slots
        self._device = placement.mesh.local_devices[0]
        self._ranks = placement.spec.token_ranks.count

    def shape(self, kv_tokens: int | None, weights: Iterable[Array], program_bytes: Callable[[CacheShape], int]) -> CacheShape:
        """Room for ``kv_tokens`` tokens of all sequences together; None: for as many as memory allows, up to the context in each slot.

        ``program_bytes``: what programs need on a device beside weights and such a cache. It is asked on GPUs, if ``kv_tokens`` is None.
        Raises ValueError if the device has less memory than that takes beside the weights.
        """
        available = self._available_bytes(weights)
        if kv_tokens is not None:
            shape = self._holding(-(-kv_tokens // self._placement.spec.data))
            needed = self._bytes(shape)
            if needed > available:
                raise ValueError(
                    f"a KV cache of {kv_tokens} tokens takes {needed / 1e9:.1f} GB, and beside the weights this device has "
                    f"{available / 1e9:.1f} GB; lower kv_tokens or max_batch, or use more devices"
                )
            return shape
        if self._device.platform == "cpu":
            return self._largest(available * _CPU_SHARE, rounded=True)
        guess = self._largest(available * _GPU_GUESS)
        return self._largest((available - max(map(int, hosts.share(str(program_bytes(guess)))))) * _GPU_SHARE)

    def _largest(self, budget: float, *, rounded: bool = False) -> CacheShape:
        """The largest cache that takes no more than this many bytes, up to the context in each slot.

        ``rounded``: if it has less, to a number of pages with three binary digits before its zeros. What is free changes from process to
        process, and with it programs that could have been loaded would be compiled.
        """
        block = PAGE_SIZE * self._ranks
        least, most = 1, (whole := self._slots * -(-self._placement.config.max_position_embeddings // block))
        if (smallest := self._bytes(self._holding(block))) > budget:
            raise ValueError(
                f"a KV cache of {block} tokens takes {smallest / 1e9:.1f} GB, and may take {max(budget, 0) / 1e9:.1f} GB "
                "beside the weights; lower max_batch, use more devices, or set kv_tokens"
            )
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if self._bytes(self._holding(middle * block)) <= budget else (least, middle - 1)
        if rounded and least < whole:
            least -= least % (1 << max(0, least.bit_length() - 3))
        return self._holding(least * block)

    def abstract(self, shape: CacheShape) -> Resident:
        """What stays on the devices for such a cache."""
        return Resident.abstract(self._placement, self._drafter, shape, self._dtype)

    def _holding(self, tokens: int) -> CacheShape:
        """Room for this many tokens on each data rank."""
        full = -(-tokens // (PAGE_SIZE * self._ranks))
        chunk = self._placement.config.attention_chunk_size
        # While one chunk of a sequence is read another is begun; finished prefixes keep theirs for as long as there is room.
        local = 0 if chunk is None else min(full * self._ranks, 2 * self._slots * -(-chunk // PAGE_SIZE))
        return CacheShape(self._slots, full, local)

    def _bytes(self, shape: CacheShape) -> int:
        leaves = jax.tree.leaves(self.abstract(shape))
        if self._device.platform == "cpu":  # all of its devices share the machine's memory
            return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    def _available_bytes(self, weights: Iterable[Array]) -> float:
        """What a device of the process that has least has beside the weights."""
        return min(map(float, hosts.share(str(own_available_bytes(self._device, weights)))))


def own_available_bytes(device: jax.Device, weights: Iterable[Array]) -> float:
    """What this process's device has beside the weights; on a CPU, whose memory has them already, what is free."""
    if device.platform == "cpu":
        return free_bytes()
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in weights)
    return (device.memory_stats() or {}).get("bytes_limit", math.inf) - held


def free_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the machine, or the container if it has a limit, has free or could free; where it does not say, all of its memory."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        said = re.search(r"^MemAvailable: *(\d+) kB$", meminfo.read_text(), re.MULTILINE)
        free = free if said is None else int(said[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no limit is "max"
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        files = re.search(r"^inactive_file (\d+)$", (cgroup / "memory.stat").read_text(), re.MULTILINE)
        free = min(free, limit - used + (0 if files is None else int(files[1])))
    return free

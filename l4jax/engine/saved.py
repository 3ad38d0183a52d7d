"""Sequences that wait in host memory: copies their slots and pages there, keeps them, and copies them back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jaxtyping import Array

from l4jax.cache import PageTables
from l4jax.compiled import Call
from l4jax.engine.step import Load, Save
from l4jax.parallel.arrays import host_array
from l4jax.program_inputs import Resident, SlotPages, copy_specs
from l4jax.programs import Programs
from sharding.mesh import MeshSpec

_PAGES_A_CALL = 8
"""Pages of each kind that one call copies."""
_COPIES_ON_DEVICES = 4
"""How many copies of one sequence may be on the devices at a time: the memory that they take is not counted when the cache is sized."""
_NO_SLOT_OR_PAGE = 2**31 - 1
"""A number past the last slot and the last page."""


@dataclasses.dataclass(frozen=True)
class _HostArray:
    """A device array's copy in host memory: the shards of this process's devices, replicas once."""

    shape: tuple[int, ...]
    sharding: Sharding
    shards: dict[str, np.ndarray]

    @classmethod
    def of(cls, array: Array) -> _HostArray:
        """Wait for the array, and copy it."""
        own: dict[str, np.ndarray] = {}
        for shard in array.addressable_shards:
            if str(shard.index) not in own:
                own[str(shard.index)] = np.asarray(shard.data)
        return cls(array.shape, array.sharding, own)

    def on_devices(self) -> Array:
        """The array on the devices again."""
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self.shards[str(index)])


class _Copy:
    """What one call has copied: on the devices, and from the beginning on its way to host memory."""

    def __init__(self, arrays: Resident) -> None:
        self._tree: Any = arrays
        self._is_fetched = False
        for leaf in jax.tree.leaves(arrays):
            leaf.copy_to_host_async()

    @property
    def is_ready(self) -> bool:
        """Whether :meth:`fetch` need not wait for the devices."""
        return self._is_fetched or all(leaf.is_ready() for leaf in jax.tree.leaves(self._tree))

    def fetch(self) -> None:
        """Wait until it is in host memory, and free the devices' memory."""
        if not self._is_fetched:
            self._tree = jax.tree.map(_HostArray.of, self._tree)
            self._is_fetched = True

    def on_devices(self) -> Resident:
        """The arrays on the devices again."""
        self.fetch()
        arrays: Resident = jax.tree.map(_HostArray.on_devices, self._tree, is_leaf=lambda leaf: isinstance(leaf, _HostArray))
        return arrays


class SavedSequences:
    """The sequences of one engine that wait in host memory, by request. Each process keeps the part of its own devices."""

    def __init__(self, programs: Programs, spec: MeshSpec) -> None:
        self._programs, self._spec = programs, spec
        self._copies: dict[int, list[_Copy]] = {}

    def save(self, resident: Resident, save: Save) -> None:
        """Copy a slot's state and its pages. Waits while more than ``_COPIES_ON_DEVICES`` copies have not reached the host."""
        copies = self._copies[save.request] = []
        for pages in self._pages_a_call(resident, save):
            copied = self._programs.save(resident, pages)
            copies.append(_Copy(dataclasses.replace(copied, slots=None) if copies else copied))
            if len(copies) > _COPIES_ON_DEVICES:
                copies[-1 - _COPIES_ON_DEVICES].fetch()

    def load(self, resident: Resident, load: Load) -> Resident:
        """Write a saved sequence to a slot and to pages, and drop its copies; returns the new resident state."""
        slots, copies, calls = None, self._copies.pop(load.request), list(self._pages_a_call(resident, load))
        assert len(copies) >= len(calls), "a page was not saved"
        for number, (copy, pages) in enumerate(zip(copies, calls, strict=False)):
            arrays = copy.on_devices()
            slots = arrays.slots if slots is None else slots
            resident = self._programs.load(resident, dataclasses.replace(arrays, slots=slots), pages)
            if number % _COPIES_ON_DEVICES == _COPIES_ON_DEVICES - 1:
                jax.block_until_ready(resident.slots.token_U)
        return resident

    def drop(self, request: int) -> None:
        """Drop a request's copies."""
        del self._copies[request]

    def fetch(self) -> None:
        """Free the devices' memory of copies that have reached the host."""
        for copies in self._copies.values():
            for copy in copies:
                if copy.is_ready:
                    copy.fetch()

    def calls(self, resident: Resident) -> list[Call]:
        """A call of the program that saves, and one of the program that loads."""
        [pages] = self._pages_a_call(resident, Save(0, 0, (), ()))
        ranks, one_rank = self._spec.token_ranks.count, copy_specs(self._spec)

        def abstract(count: int, specs: Any, tree: Any) -> Any:
            def of(spec: Any, leaves: Any) -> Any:
                return jax.tree.map(lambda leaf: _like(leaf, count, spec), leaves)

            return jax.tree.map(of, specs, tree)

        cache = abstract(_PAGES_A_CALL * ranks, one_rank.cache, resident.cache)
        draft_cache = abstract(_PAGES_A_CALL * ranks, one_rank.draft_cache, resident.draft_cache)
        copy = Resident(cache, draft_cache, abstract(1, one_rank.slots, resident.slots))
        return [Call(self._programs.save, (resident, pages), {}), Call(self._programs.load, (resident, copy, pages), {})]

    def _pages_a_call(self, resident: Resident, of: Save | Load) -> Iterator[SlotPages]:
        """The slot, and the pages that each call copies."""
        data = self._spec.data
        rank, slot = divmod(of.slot, len(resident.slots.token_U) // data)

        def row(numbers: tuple[int, ...], width: int) -> Array:
            row_BW = np.full((data, width), _NO_SLOT_OR_PAGE, np.int32)
            row_BW[rank, : len(numbers)] = numbers
            return host_array(row_BW, np.int32)

        slot_B = row((slot,), 1)[:, 0]
        for start in range(0, max(1, len(of.full), len(of.local)), _PAGES_A_CALL):
            full, local = (table[start : start + _PAGES_A_CALL] for table in (of.full, of.local))
            yield SlotPages(slot_B, PageTables(row(full, _PAGES_A_CALL), row(local, _PAGES_A_CALL)))


def _like(leaf: Any, count: int, spec: Any) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding of ``count`` slots or pages of an array."""
    return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype, sharding=NamedSharding(leaf.sharding.mesh, spec))

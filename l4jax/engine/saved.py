"""Sequences that wait in host memory: copies of their slots and pages, on their way there, kept, and on their way back."""

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
from l4jax.program_inputs import Place, Resident, copy_specs
from l4jax.programs import Programs
from sharding.mesh import MeshSpec

_PAGES = 8
"""Pages of each kind that one call copies."""
_ON_DEVICES = 4
"""Copies of one sequence that may be on the devices at a time: what they take is not counted when the cache is sized."""
_PAST = 2**31 - 1
"""A number past the last slot and the last page."""


@dataclasses.dataclass(frozen=True)
class _Parts:
    """An array in host memory: the parts that this process's devices had, each once."""

    shape: tuple[int, ...]
    sharding: Sharding
    parts: dict[str, np.ndarray]

    @classmethod
    def of(cls, array: Array) -> _Parts:
        """Wait for the array, and take it from the devices."""
        own: dict[str, np.ndarray] = {}
        for shard in array.addressable_shards:
            if str(shard.index) not in own:
                own[str(shard.index)] = np.asarray(shard.data)
        return cls(array.shape, array.sharding, own)

    def on_devices(self) -> Array:
        """The array again."""
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self.parts[str(index)])


class _Copy:
    """What one call has copied. It is on its way to host memory from the beginning."""

    def __init__(self, arrays: Resident) -> None:
        self._tree: Any = arrays
        self._is_fetched = False
        for leaf in jax.tree.leaves(arrays):
            leaf.copy_to_host_async()

    @property
    def is_ready(self) -> bool:
        """Whether it can be fetched without waiting for the devices."""
        return self._is_fetched or all(leaf.is_ready() for leaf in jax.tree.leaves(self._tree))

    def fetch(self) -> None:
        """Wait for it, and free the devices' memory."""
        if not self._is_fetched:
            self._tree = jax.tree.map(_Parts.of, self._tree)
            self._is_fetched = True

    def on_devices(self) -> Resident:
        """The arrays again."""
        self.fetch()
        back: Resident = jax.tree.map(_Parts.on_devices, self._tree, is_leaf=lambda leaf: isinstance(leaf, _Parts))
        return back


class SavedSequences:
    """The sequences of one engine that wait in host memory, by their requests' numbers; each process keeps its devices' part of each."""

    def __init__(self, programs: Programs, spec: MeshSpec) -> None:
        self._programs, self._spec = programs, spec
        self._copies: dict[int, list[_Copy]] = {}

    def save(self, resident: Resident, save: Save) -> None:
        """Copy a slot's state and its pages. Beyond ``_ON_DEVICES`` copies it waits until the oldest has reached the host."""
        copies = self._copies[save.request] = []
        for place in self._places(resident, save):
            copied = self._programs.save(resident, place)
            copies.append(_Copy(dataclasses.replace(copied, slots=None) if copies else copied))
            if len(copies) > _ON_DEVICES:
                copies[-1 - _ON_DEVICES].fetch()

    def load(self, resident: Resident, load: Load) -> Resident:
        """Write the copy back to a slot and to pages, and drop it; returns the new resident state."""
        slots, copies, places = None, self._copies.pop(load.request), list(self._places(resident, load))
        assert len(copies) >= len(places), "a page was not saved"
        for number, (copy, place) in enumerate(zip(copies, places, strict=False)):
            arrays = copy.on_devices()
            slots = arrays.slots if slots is None else slots
            resident = self._programs.load(resident, dataclasses.replace(arrays, slots=slots), place)
            if number % _ON_DEVICES == _ON_DEVICES - 1:
                jax.block_until_ready(resident.slots.token_U)
        return resident

    def drop(self, request: int) -> None:
        """Forget a copy."""
        del self._copies[request]

    def fetch(self) -> None:
        """Free the devices' memory of the copies that have arrived."""
        for copies in self._copies.values():
            for copy in copies:
                if copy.is_ready:
                    copy.fetch()

    def calls(self, resident: Resident) -> list[Call]:
        """A call of each program."""
        [place] = self._places(resident, Save(0, 0, (), ()))
        ranks, one_rank = self._spec.token_ranks.count, copy_specs(self._spec)

        def abstract(count: int, specs: Any, tree: Any) -> Any:
            def of(spec: Any, leaves: Any) -> Any:
                return jax.tree.map(lambda leaf: _like(leaf, count, spec), leaves)

            return jax.tree.map(of, specs, tree)

        cache = abstract(_PAGES * ranks, one_rank.cache, resident.cache)
        draft_cache = abstract(_PAGES * ranks, one_rank.draft_cache, resident.draft_cache)
        copy = Resident(cache, draft_cache, abstract(1, one_rank.slots, resident.slots))
        return [Call(self._programs.save, (resident, place), {}), Call(self._programs.load, (resident, copy, place), {})]

    def _places(self, resident: Resident, of: Save | Load) -> Iterator[Place]:
        """Where each call copies from, or to."""
        data = self._spec.data
        rank, slot = divmod(of.slot, len(resident.slots.token_U) // data)

        def row(numbers: tuple[int, ...], width: int) -> Array:
            row_DW = np.full((data, width), _PAST, np.int32)
            row_DW[rank, : len(numbers)] = numbers
            return host_array(row_DW, np.int32)

        slot_D = row((slot,), 1)[:, 0]
        for start in range(0, max(1, len(of.full), len(of.local)), _PAGES):
            full, local = (table[start : start + _PAGES] for table in (of.full, of.local))
            yield Place(slot_D, PageTables(row(full, _PAGES), row(local, _PAGES)))


def _like(leaf: Any, count: int, spec: Any) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding of ``count`` slots or pages of an array."""
    return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype, sharding=NamedSharding(leaf.sharding.mesh, spec))

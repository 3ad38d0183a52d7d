"""One table that turns the logical axes of an array into its sharding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.mesh import MeshSpec

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data",),
    "pages": ("data", "sequence", "expert"),
    "vocab": ("tensor",),
    "kv_heads": ("tensor",),
    "feed_forward": ("tensor",),
    "expert": ("expert",),
    "embed": (),
    "head_dim": (),
}
"""The mesh axes that each logical axis is sharded along, outermost first; without any, every device has the whole axis."""


def partition(mesh: MeshSpec, *axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes."""
    # Mesh axes of one device shard nothing. They are left out, so that equal shardings compare equal however they were made.
    cuts = [() if axis is None else mesh.along(*RULES[axis]).axes for axis in axes]
    entries = [None if not cut else cut[0] if len(cut) == 1 else cut for cut in cuts]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def check_divides(name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: MeshSpec) -> None:
    """Raise ValueError, naming the array and the sizes that would work, if a dimension cannot be cut evenly."""
    if len(shape) != len(axes):
        raise ValueError(f"{name} has {len(shape)} dimensions and {len(axes)} logical axes; expected one logical axis for each dimension")
    taken: list[str] = []
    for size, axis in zip(shape, axes, strict=True):
        cut = mesh.along(*RULES[axis]) if axis is not None else mesh.along()
        if size % cut.count:
            along = " x ".join(f"{mesh_axis}={getattr(mesh, mesh_axis)}" for mesh_axis in cut.axes)
            fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise ValueError(
                f"{name} has {size} along {axis}, which mesh axis {along} does not divide; {' x '.join(cut.axes)} may be {fitting}"
            )
        taken += cut.axes
    if len(set(taken)) < len(taken):
        raise ValueError(f"{name} with the logical axes {tuple(axes)} would be cut twice along one mesh axis: {tuple(taken)}")


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding on a mesh of an array with these logical axes."""
    return NamedSharding(mesh, partition(MeshSpec.of(mesh), *axes))

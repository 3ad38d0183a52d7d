"""From the logical axes of an array to its sharding: one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: Mapping[str, str | None] = {
    "batch": "data",
    "sequence": "sequence",
    "vocab": "tensor",
    "kv_heads": "tensor",
    "feed_forward": "tensor",
    "expert": "expert",
    "embed": None,
    "head_dim": None,
}
"""The mesh axis that each logical axis is cut along; None: every device has all of it."""


def sharding(name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh) -> NamedSharding:
    """How the array ``name`` of this shape and these logical axes lies on a mesh.

    Raises ValueError, naming the array and the sizes that would work, where a dimension cannot be cut evenly.
    """
    if len(shape) != len(axes):
        raise ValueError(f"{name} has {len(shape)} dimensions and {len(axes)} logical axes; expected as many")
    spec: list[str | None] = []
    for size, axis in zip(shape, axes, strict=True):
        mesh_axis = None if axis is None else RULES[axis]
        devices = 1 if mesh_axis is None else mesh.shape[mesh_axis]
        if size % devices:
            fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise ValueError(
                f"{name} has {size} along {axis}, which mesh axis {mesh_axis}={devices} does not divide; {mesh_axis} may be {fitting}"
            )
        # An axis of one device cuts nothing: left out, shardings compare equal however they came about.
        spec.append(mesh_axis if devices > 1 else None)
    taken = [axis for axis in spec if axis is not None]
    if len(set(taken)) < len(taken):
        raise ValueError(f"{name} with the logical axes {tuple(axes)} would be cut twice along one mesh axis: {tuple(spec)}")
    return NamedSharding(mesh, PartitionSpec(*spec))

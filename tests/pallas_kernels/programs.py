"""Compiles functions as l4jax does, on a mesh: an op reads off the mesh which devices it is traced for."""

import jax
from jax.sharding import PartitionSpec

from sharding.mesh import ONE_DEVICE


def on_a(kind):
    """What a program that is compiled for a GPU of this kind is traced on."""
    device = jax.sharding.AbstractDevice(kind, None, platform="gpu")
    return jax.sharding.AbstractMesh((1,), ("tensor",), (jax.sharding.AxisType.Auto,), abstract_device=device)


AN_H100 = on_a("NVIDIA H100 80GB HBM3")


def on_one_cpu(function):
    """A program of ``function`` for one CPU."""
    mesh = ONE_DEVICE.build(jax.devices("cpu")[:1])
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False))

"""Compiles functions as l4jax does, on a mesh of CPUs: an op reads off the mesh which devices it is traced for."""

import jax
from jax.sharding import PartitionSpec

from sharding.mesh import ONE_DEVICE

A_GPU = jax.sharding.AbstractMesh(
    (1,), ("tensor",), (jax.sharding.AxisType.Auto,), abstract_device=jax.sharding.AbstractDevice("NVIDIA H100", None, platform="gpu")
)
"""What a program that is compiled for an H100 is traced on."""


def on_one_cpu(function):
    """A program of ``function`` for one CPU."""
    mesh = ONE_DEVICE.build(jax.devices("cpu")[:1])
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False))

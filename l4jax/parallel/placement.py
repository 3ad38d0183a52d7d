"""Weights on a mesh: how each weight is sharded, and how KV heads are repeated if the tensor axis has more devices than KV heads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from l4jax.config import DrafterConfig, ModelConfig
from l4jax.model.drafter import Drafter, build_drafter
from l4jax.model.llama import Llama
from l4jax.model.weights import weight_specs
from l4jax.parallel.arrays import global_array
from sharding.kinds import shown
from sharding.mesh import ONE_DEVICE, MeshSpec
from sharding.rules import check_divides, sharding
from sharding.words import counted


def repeat_kv_heads(config: ModelConfig, tensor: int) -> ModelConfig:
    """Repeat each KV head until there are at least ``tensor`` KV heads; a model that has enough is returned as it is.

    A head's query heads are divided among its copies, so only keys and values are computed more than once. Raises ValueError,
    naming the sizes that would work, if ``tensor`` does not divide the heads.
    """
    heads, kv_heads = config.num_heads, config.num_kv_heads
    fitting = [n for n in range(1, heads + 1) if kv_heads % n == 0 or (n % kv_heads == 0 and heads % n == 0)]
    if tensor not in fitting:
        raise ValueError(
            f"layers.0.attention.qkv has {counted(heads, 'query head')} in {counted(kv_heads, 'group')} of one KV head, which "
            f"mesh axis tensor={tensor} does not divide; tensor may be {', '.join(map(str, fitting))}"
        )
    return dataclasses.replace(config, num_kv_heads=max(kv_heads, tensor))


class Placement:
    """Where a model's weights go on a mesh. ``config`` is the model that the mesh computes (see :func:`repeat_kv_heads`).

    Raises ValueError, naming the weight and the sizes that would work, if the mesh does not divide one.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        self.mesh = mesh
        self.spec = MeshSpec.of(mesh)
        self.config = repeat_kv_heads(config, self.spec.tensor)
        self._copies = self.config.num_kv_heads // config.num_kv_heads
        self._stored = weight_specs(self.build(config))
        self._specs = weight_specs(self.build(self.config))
        for name, spec in self._specs.items():
            check_divides(name, spec.shape, spec.axes, self.spec)

    def build(self, config: ModelConfig, mesh: MeshSpec = ONE_DEVICE) -> nnx.Module:
        """Build the module that has these weights."""
        return Llama(config, mesh)

    @classmethod
    def on(cls, config: ModelConfig, mesh: str | MeshSpec) -> Placement:
        """Place the model on the devices of this machine, or of all processes if there are several."""
        spec = MeshSpec.parse(mesh) if isinstance(mesh, str) else mesh
        if not isinstance(spec, MeshSpec):
            raise ValueError(f'the mesh is {shown(mesh)}; expected a description such as "sequence=4,tensor=2", or an l4jax.MeshSpec')
        return cls(config, spec.build())

    def weight_sharding(self, name: str) -> NamedSharding:
        """The weight's sharding on the mesh."""
        return sharding(self.mesh, *self._specs[name].axes)

    def array_sharding(self, *axes: str | None) -> NamedSharding:
        """The sharding on the mesh of an array with these logical axes."""
        return sharding(self.mesh, *axes)

    def read_sharding(self, name: str) -> NamedSharding:
        """The sharding in which to read the weight, in its stored shape, so that no device reads a KV head that it will not use."""
        if self._stored[name].shape == self._specs[name].shape:
            return self.weight_sharding(name)
        # Each device reads the whole qkv group of its KV head. The output projection's repeated shape has the same numbers in the same
        # order, so of it each device reads only its part.
        entries = {"qkv": ("kv_head",), "out": (None, "kv_head", "copy")}[name.rsplit(".", 1)[-1]]
        return NamedSharding(self._kv_mesh, PartitionSpec(*entries))

    def place(self, name: str, weight: Array) -> Array:
        """Put a weight on the mesh: one in its stored shape, or one that an earlier call returned."""
        target = self._specs[name].shape
        if not isinstance(weight, np.ndarray | jax.Array):
            raise ValueError(f"weight {name} is {shown(weight)}; expected an array of shape {self._stored[name].shape}")
        floating = jnp.issubdtype(self._specs[name].dtype(jnp.dtype(jnp.float32)), jnp.floating)
        if jnp.issubdtype(weight.dtype, jnp.floating) != floating:
            raise ValueError(f"weight {name} has dtype {weight.dtype}; expected {'one of floating-point numbers' if floating else 'int32'}")
        if weight.shape == target:
            return global_array(weight, self.weight_sharding(name))
        if weight.shape != self._stored[name].shape:
            raise ValueError(f"weight {name} has shape {weight.shape}; expected {self._stored[name].shape}")
        weight = global_array(weight, self.read_sharding(name))
        if name.endswith(".qkv"):
            weight = self._split_groups(weight)
        shards = [shard.data for shard in weight.addressable_shards]
        return jax.make_array_from_single_device_arrays(target, self.weight_sharding(name), shards)

    def place_all(self, weights: Mapping[str, Array]) -> dict[str, Array]:
        """Put every weight of the decoder on the mesh. Raises ValueError if one is missing."""
        missing = [name for name in self._specs if name not in weights]
        if missing:
            raise ValueError(f"{len(missing)} of {len(self._specs)} weights are missing, {missing[0]} among them; give all of the model's")
        return {name: self.place(name, weights[name]) for name in self._specs}

    def abstract_weights(self, dtype: jnp.dtype) -> dict[str, jax.ShapeDtypeStruct]:
        """Every weight's shape, dtype and sharding on the mesh, without values."""
        return {
            name: jax.ShapeDtypeStruct(spec.shape, spec.dtype(dtype), sharding=self.weight_sharding(name))
            for name, spec in self._specs.items()
        }

    @functools.cached_property
    def _kv_mesh(self) -> Mesh:
        """The same devices in the same order, with the tensor axis split into KV heads and their copies."""
        *outer, tensor = self.mesh.devices.shape
        devices = self.mesh.devices.reshape(*outer, tensor // self._copies, self._copies)
        return Mesh(devices, (*self.mesh.axis_names[:-1], "kv_head", "copy"))

    @functools.cached_property
    def _split_groups(self) -> jax.stages.Wrapped:
        """Turn a KV head's whole group (query heads, key, value), which all of its devices have, into each device's share of it."""
        copies = self._copies

        def share(qkv_KghD: Float[Array, "K g h D"]) -> Float[Array, "K _ h D"]:
            queries = (qkv_KghD.shape[1] - 2) // copies
            first = jax.lax.axis_index("copy") * queries
            mine = jax.lax.dynamic_slice_in_dim(qkv_KghD, first, queries, axis=1)
            return jnp.concatenate([mine, qkv_KghD[:, -2:]], axis=1)

        group, copy = PartitionSpec("kv_head"), PartitionSpec(("kv_head", "copy"))
        return jax.jit(jax.shard_map(share, mesh=self._kv_mesh, in_specs=group, out_specs=copy, check_vma=False))


class DrafterPlacement(Placement):
    """Where a drafter's weights go on its target's mesh. ``config`` is the decoder that the mesh computes."""

    def __init__(self, drafter: DrafterConfig, mesh: Mesh) -> None:
        self._drafter = drafter
        super().__init__(drafter.decoder, mesh)
        self.drafter = dataclasses.replace(drafter, decoder=self.config)

    def build(self, config: ModelConfig, mesh: MeshSpec = ONE_DEVICE) -> Drafter:
        """Build the drafter with this decoder."""
        return build_drafter(dataclasses.replace(self._drafter, decoder=config), mesh)

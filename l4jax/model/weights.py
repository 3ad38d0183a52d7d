"""One declaration per weight: its shape, its logical axes and its random initialiser.

Modules declare each weight once, as an abstract ``Weight``. :func:`weight_specs` reads the declarations; random weights,
planning shapes, shardings and the converter's targets are all made from them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Literal["normal", "ones", "zeros", "numbers"]


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """A weight's shape, the logical axis of each dimension (None: never sharded) and its random initialiser.

    ``fan_in`` is the number of inputs that each output sums over; "normal" draws with variance 1 / ``fan_in``. "numbers" makes an int32
    table of 0, 1, 2, ...; every other weight has the model's own dtype.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer = "normal"
    fan_in: int = 1

    def dtype(self, model_dtype: jnp.dtype) -> jnp.dtype:
        """The weight's dtype in a model of this dtype."""
        return jnp.dtype(jnp.int32) if self.init == "numbers" else model_dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Weight(nnx.Param[Any]):
    """A parameter declared by a :class:`WeightSpec`; its value is abstract until weights are bound to the model."""

    spec: WeightSpec


def declare(spec: WeightSpec) -> Weight:
    """Declare an abstract weight: it has a shape and no memory."""
    return Weight(jax.ShapeDtypeStruct(spec.shape, spec.dtype(jnp.dtype(jnp.float32))), spec=spec)


def weight_specs(model: nnx.Module) -> dict[str, WeightSpec]:
    """Every weight that a model declares, by dotted path (``layers.0.attention.qkv``), in the order of its leaves."""
    return {".".join(map(str, path)): weight.spec for path, weight in nnx.to_flat_state(nnx.state(model, Weight))}


def random_weights(model: nnx.Module, key: jax.Array, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Draw every weight from its declaration's initialiser."""

    def draw(spec: WeightSpec, key: jax.Array) -> jax.Array:
        if spec.init == "numbers":
            return jnp.arange(spec.size, dtype=jnp.int32).reshape(spec.shape)
        if spec.init in ("ones", "zeros"):
            return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, dtype)
        return (jax.random.normal(key, spec.shape, jnp.float32) * spec.fan_in**-0.5).astype(dtype)

    specs = weight_specs(model)
    keys = jax.random.split(key, len(specs))
    return {name: draw(spec, k) for (name, spec), k in zip(specs.items(), keys, strict=True)}


class BoundModel:
    """A model's structure without its weights: compiled programs take the weights as a flat tuple and bind them back.

    ``leaves`` makes the tuple; ``bind`` makes a module of traced or concrete leaves. Passing flat leaves to ``jax.jit`` costs a
    fraction of the time that passing a module would cost at every call.
    """

    def __init__(self, model: nnx.Module) -> None:
        self._graph, state = nnx.split(model)
        self._entries = nnx.to_flat_state(state)
        self.names = tuple(".".join(map(str, path)) for path, _ in self._entries)

    def leaves(self, weights: Mapping[str, Any]) -> tuple[Any, ...]:
        """The weights in the model's own order."""
        return tuple(weights[name] for name in self.names)

    def bind(self, leaves: tuple[Any, ...]) -> Any:
        """The module with these values for weights."""
        entries = [(path, weight.replace(leaf)) for (path, weight), leaf in zip(self._entries, leaves, strict=True)]
        return nnx.merge(self._graph, nnx.from_flat_state(entries))

"""Arrays on their way between host and devices."""

from __future__ import annotations

from typing import Any, cast

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils


def host_array(values: Any, dtype: Any) -> Array:
    """A numpy array, under the type of the device array that a program makes of it.

    Programs are called with host arrays where the values are known on the host: making a device array first would dispatch,
    and for every new shape compile, a program of its own.
    """
    return cast(Array, np.asarray(values, dtype))


def global_array(values: Any, sharding: jax.sharding.Sharding) -> Array:
    """An array spread over the devices of all processes, from one that is so already or from values that each process has."""
    if sharding.is_fully_addressable or (isinstance(values, Array) and not values.is_fully_addressable):
        return jax.device_put(values, sharding)
    host = np.asarray(values)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def to_host(array: Array) -> np.ndarray:
    """The whole array as numpy in every process, also where none has it all."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))

"""Moving arrays between the host and the devices."""

from __future__ import annotations

from typing import Any, cast

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils


def host_array(values: Any, dtype: Any) -> Array:
    """Make a numpy array, typed as the device array that a program will turn it into.

    Values that the host knows are passed to programs as host arrays. Making a device array first would dispatch a program of its
    own, and compile it for every new shape.
    """
    return cast(Array, np.asarray(values, dtype))


def global_array(values: Any, sharding: jax.sharding.Sharding) -> Array:
    """Put an array on the devices of all processes: an array that already is on them, or values that every process has."""
    if sharding.is_fully_addressable or (isinstance(values, Array) and not values.is_fully_addressable):
        return jax.device_put(values, sharding)
    host = np.asarray(values)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def to_host(array: Array) -> np.ndarray:
    """Return the whole array as numpy in every process, even if no process has all of it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))

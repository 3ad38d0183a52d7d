"""Small arrays on their way into compiled programs."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from jax import Array


def host_array(values: Any, dtype: Any) -> Array:
    """A numpy array, under the type of the device array that a program makes of it.

    Programs are called with host arrays where the values are known on the host: making a device array first would dispatch,
    and for every new shape compile, a program of its own.
    """
    return cast(Array, np.asarray(values, dtype))

"""How an op finds the implementation that computes it: the first that does not raise NotImplementedError."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax


def first_supported[Result](implementations: Sequence[Callable[..., Result]], *arguments: Any, **options: Any) -> Result:
    """Call the first implementation that supports the arguments, and return its result. The last implementation must support all."""
    for implementation in implementations[:-1]:
        try:
            return implementation(*arguments, **options)
        except NotImplementedError:
            continue
    return implementations[-1](*arguments, **options)


def require_cpu() -> None:
    """Raise NotImplementedError unless the program that is being traced is for CPUs.

    The devices of the mesh decide, not those of this machine: programs for H100s are compiled on machines without one.
    """
    _require("cpu")


def require_gpu() -> None:
    """Raise NotImplementedError unless the program that is being traced is for GPUs; the mesh decides as in :func:`require_cpu`."""
    _require("gpu")


def _require(platform: str) -> None:
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform != platform:
        raise NotImplementedError(f"written for XLA's {platform.upper()} backend; the program is for other devices")

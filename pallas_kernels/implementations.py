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
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform != "cpu":
        raise NotImplementedError("written for XLA's CPU backend; the program is for other devices")

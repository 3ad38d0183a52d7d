"""How an op finds the implementation that computes it: the first, in order, that supports the arguments."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Implementation = str | Sequence[str] | None
"""The name of an implementation, or several in the order in which they are tried. None: try all of the op's, in order."""

_LOGGER = logging.getLogger("l4jax.kernels")
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")


def first_supported[Result](
    op: str, implementations: Mapping[str, Callable[..., Result]], chosen: Implementation, *arguments: Any, **options: Any
) -> Result:
    """Try the chosen implementations in order. One that does not support the arguments raises NotImplementedError, and the next is tried.

    Raises NotImplementedError with each one's reason if none supports them, and ValueError for a name that the op does not have.
    """
    names = list(implementations) if chosen is None else [chosen] if isinstance(chosen, str) else list(chosen)
    reasons = []
    for name in names:
        if name not in implementations:
            raise ValueError(f"implementation is {name!r}; {op} has {', '.join(implementations)}")
        try:
            return implementations[name](*arguments, **options)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError(f"no implementation of {op} takes these arguments ({'; '.join(reasons) or 'none was chosen'})")


def require_cpu() -> None:
    """Raise NotImplementedError unless the program that is being traced is for CPUs.

    The devices of the mesh decide, not those of this machine: programs for H100s are compiled on machines without one.
    """
    _require("cpu")


def require_gpu() -> None:
    """Raise NotImplementedError unless the program that is being traced is for GPUs; the mesh decides as in :func:`require_cpu`."""
    _require("gpu")


def require_hopper() -> None:
    """Raise NotImplementedError unless the program that is being traced is for GPUs of NVIDIA's Hopper generation.

    For other GPUs a line of the log says, once, that XLA's own kernels are used.
    """
    kind = _require("gpu")
    if not is_hopper(kind):
        _log_other_gpu(kind)
        raise NotImplementedError(f"written for Hopper GPUs (H100, H200, H20, H800, GH200); the program is for {kind}")


def is_hopper(kind: str) -> bool:
    """Whether a device of this kind is a GPU of the Hopper generation."""
    return _HOPPER.search(kind) is not None


def _require(platform: str) -> str:
    """The kind of device that the program is for, if it is of this platform."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        raise NotImplementedError(f"written for {platform.upper()}s; there is no mesh that says what the program is for")
    if device.platform != platform:
        raise NotImplementedError(f"written for {platform.upper()}s; the program is for {device.platform.upper()}s")
    return device.device_kind


@functools.cache
def _log_other_gpu(kind: str) -> None:
    _LOGGER.warning("%s is not a Hopper GPU: XLA's kernels are used instead of l4jax's own, which are written for H100s", kind)

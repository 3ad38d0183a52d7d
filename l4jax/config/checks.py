"""Checks of configurations."""

from __future__ import annotations

import math
import numbers
from typing import Any


class ConfigError(ValueError):
    """A configuration of a model that l4jax cannot compute; the message is one line."""


def check(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def check_positive(config: Any, *names: str) -> None:
    """Raise :class:`ConfigError` unless these fields are finite numbers above 0."""
    for name in names:
        value = getattr(config, name)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        check(number and value > 0 and math.isfinite(value), f"{name} is {value!r}; expected a number above 0")

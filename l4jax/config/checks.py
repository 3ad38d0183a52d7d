"""Checks of configurations."""

from __future__ import annotations

import math
from typing import Any

from sharding.kinds import is_number, shown


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
        check(is_number(value) and 0 < value < math.inf, f"{name} is {shown(value)}; expected a number above 0")

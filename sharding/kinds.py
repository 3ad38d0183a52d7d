"""Which values are numbers: Python's and numpy's, but no truth values, which both count as whole numbers 0 and 1."""

from __future__ import annotations

import numbers
import reprlib

_repr = reprlib.Repr(maxstring=60, maxother=60)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A value as error messages show it: on one line, cut short."""
    return " ".join(_repr.repr(value).split())

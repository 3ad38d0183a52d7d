"""Which values are numbers, Python's and numpy's, but no truth values, which both count as 0 and 1; and how messages show values."""

from __future__ import annotations

import math
import numbers
import reprlib

_MOST_CHARACTERS = 160


def is_whole(value: object) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A value as error messages show it: on one line, cut short."""
    text = " ".join(_repr.repr(value).split())
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."


class _Repr(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write integers of thousands of digits."""
        if x.bit_length() > 1024:
            return f"{'-' if x < 0 else ''}<an integer of about {math.ceil(x.bit_length() * math.log10(2))} digits>"
        return super().repr_int(x, level)


_repr = _Repr(maxstring=60, maxother=60)

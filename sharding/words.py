"""Words of messages."""

from __future__ import annotations


def counted(number: int, one: str, several: str | None = None) -> str:
    """Return a number with what it counts: "1 device", "2,048 devices"; ``several``: the plural, where it does not just end in s."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"

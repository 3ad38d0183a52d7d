"""Why an item was not measured, where that is no fault of the program."""

from __future__ import annotations


class NotHere(Exception):
    """The item cannot be measured here, and why: a package or a kind of device is missing."""


class TooLittleMemory(Exception):
    """A program needs more memory than the device has, and how much."""

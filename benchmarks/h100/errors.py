"""Reasons for not measuring an item that are not faults of the program."""

from __future__ import annotations


class NotHere(Exception):
    """The item cannot be measured here, because a package or a kind of device is missing; the message says which."""


class TooLittleMemory(Exception):
    """A program needs more memory than the device has; the message says how much."""


class DeviceBroken(Exception):
    """The device does not respond to this process any more; a new process may find it in order."""

"""Reading configuration values with their types checked and their provenance kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from l4jax.config import ConfigError
from sharding.words import counted

_ARTICLES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


class Section:
    """Part of a configuration file: its values, its format's defaults, and a record of where each value was found."""

    def __init__(self, values: Mapping[str, Any], place: str, defaults: Mapping[str, Any], owner: str, sources: dict[str, str]) -> None:
        self.values = values
        self.place = place
        self.sources = sources
        self._defaults = defaults
        self._owner = owner

    def take(self, field: str, key: str, kind: type) -> Any:
        """Return the value of ``key``, for the field ``field``."""
        value = self.take_optional(field, key, kind)
        if value is None:
            raise ConfigError(f"{self.place}{key} is null; expected {article(kind)}")
        return value

    def take_optional(self, field: str, key: str, kind: type) -> Any:
        """Return as :meth:`take` does, or None where the format allows null."""
        if key in self.values:
            self.sources[field] = self.place + key
            return convert(self.values[key], kind, self.place + key)
        if key not in self._defaults:
            raise ConfigError(f"{self.place}{key} is missing; expected {article(kind)}")
        self.sources[field] = f"default of {self._owner}: {json_word(self._defaults[key])}"
        return self._defaults[key]

    def derive(self, field: str, value: Any, how: str) -> Any:
        """Return ``value``, which no single field holds, and record ``how`` it was derived."""
        self.sources[field] = f"derived from {how}"
        return value

    def refuse_other(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise :class:`ConfigError` for a field whose value asks for what the decoder does not compute."""
        for key, values in allowed.items():
            value = self.values.get(key, values[0])
            if not any(value is known or value == known for known in values):
                expected = " or ".join(dict.fromkeys(map(json_word, values)))
                raise ConfigError(
                    f"{self.place}{key} is {shorten(value)}, which is not supported; expected {expected}, or no field of this name"
                )


def presence(key: str, *, there: bool) -> str:
    """What a value is derived from that depends on whether a tensor is there, in words."""
    return f"the {'presence' if there else 'absence'} of {key}"


def head_dim(section: Section, given: int | None, hidden: int, heads: int) -> int:
    """Return the head dimension ``given``, or width / heads, which all formats document as its default."""
    if given is not None:
        return given
    if hidden <= 0 or heads <= 0 or hidden % heads:
        raise ConfigError(
            f"{section.place}width {hidden} is not a multiple of {counted(heads, 'head')}, and no head dimension is given; add it"
        )
    return int(section.derive("head_dim", hidden // heads, "width / heads"))


def plain_attention(section: Section, num_layers: int) -> dict[str, Any]:
    """Return the values that the fields of Llama 4 have in Llama 3, as arguments of ModelConfig."""
    fields = {
        "rope_layers": (True,) * num_layers,
        "attention_chunk_size": None,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        # Unused without attention temperature; the defaults that Llama 4 documents.
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "moe": None,
        "vision": None,
    }
    for field in fields:
        section.derive(field, None, "the architecture, Llama 3")
    return fields


def convert(value: Any, kind: type, place: str) -> Any:
    """Return ``value`` as ``kind``; None stays None. A whole number may be written as 8192.0, a truth value as 0 or 1."""
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (kind is float and number) or (kind is int and number and int(value) == value) or (kind is str and isinstance(value, str)):
        return kind(value)
    if kind is bool and isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise ConfigError(f"{place} is {shorten(value)}; expected {article(kind)}")


def article(kind: type) -> str:
    """Return ``kind`` in words."""
    return _ARTICLES[kind]


def shorten(value: Any) -> str:
    """Return ``value`` as one short line for a message."""
    text = json_word(value)
    return text if len(text) <= 60 else text[:57] + "..."


def json_word(value: Any) -> str:
    """Return ``value`` as JSON writes it; a value that JSON has no form for, as Python does."""
    return json.dumps(value, default=repr)

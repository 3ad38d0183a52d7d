"""Reading configuration values with their types checked and their provenance kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from l4jax.config import ConfigError

_ARTICLES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


class Section:
    """Part of a configuration file: its values, its format's defaults, and a record of where each value came from."""

    def __init__(self, values: Mapping[str, Any], place: str, defaults: Mapping[str, Any], owner: str, sources: dict[str, str]) -> None:
        self.values = values
        self.place = place
        self.sources = sources
        self._defaults = defaults
        self._owner = owner

    def take(self, field: str, key: str, kind: type) -> Any:
        """The value of ``key``, which is to become ``field``."""
        value = self.take_optional(field, key, kind)
        if value is None:
            raise ConfigError(f"{self.place}{key} is null; expected {article(kind)}")
        return value

    def take_optional(self, field: str, key: str, kind: type) -> Any:
        """As :meth:`take`, where the format allows null."""
        if key in self.values:
            self.sources[field] = self.place + key
            return convert(self.values[key], kind, self.place + key)
        if key not in self._defaults:
            raise ConfigError(f"{self.place}{key} is missing; expected {article(kind)}")
        self.sources[field] = f"default of {self._owner}: {json_word(self._defaults[key])}"
        return self._defaults[key]

    def derive(self, field: str, value: Any, how: str) -> Any:
        """Record ``how`` a value that is in no one field came about."""
        self.sources[field] = f"derived from {how}"
        return value

    def refuse_other(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise :class:`ConfigError` for a field whose value asks for something that is not computed here."""
        for key, values in allowed.items():
            value = self.values.get(key, values[0])
            if not any(value is known or value == known for known in values):
                expected = " or ".join(dict.fromkeys(map(json_word, values)))
                raise ConfigError(f"{self.place}{key} is {shorten(value)}, which is not supported; expected {expected}, or no such field")


def head_dim(section: Section, given: int | None, hidden: int, heads: int) -> int:
    """The head dimension ``given``, or else width / heads, which all formats document as its default."""
    if given is not None:
        return given
    if hidden <= 0 or heads <= 0 or hidden % heads:
        raise ConfigError(f"{section.place}width {hidden} is no multiple of {heads} heads, and no head dimension is given; add it")
    return int(section.derive("head_dim", hidden // heads, "width / heads"))


def plain_attention(section: Section, num_layers: int) -> dict[str, Any]:
    """What Llama 3 has for the fields of Llama 4, as arguments of ModelConfig."""
    fields = {
        "rope_layers": (True,) * num_layers,
        "attention_chunk_size": None,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        # Unused without attention temperature; the values that Llama 4 documents.
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "moe": None,
        "vision": None,
    }
    for field in fields:
        section.derive(field, None, "the architecture, Llama 3")
    return fields


def convert(value: Any, kind: type, place: str) -> Any:
    """``value`` as ``kind``; None stays None. A whole number may be written as 8192.0, a truth value as 0 or 1."""
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (kind is float and number) or (kind is int and number and int(value) == value) or (kind is str and isinstance(value, str)):
        return kind(value)
    if kind is bool and isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise ConfigError(f"{place} is {shorten(value)}; expected {article(kind)}")


def article(kind: type) -> str:
    """``kind`` in words."""
    return _ARTICLES[kind]


def shorten(value: Any) -> str:
    """``value`` as one short line for a message."""
    text = json_word(value)
    return text if len(text) <= 60 else text[:57] + "..."


def json_word(value: Any) -> str:
    """``value`` as JSON has it, and what JSON does not know as Python has it."""
    return json.dumps(value, default=repr)

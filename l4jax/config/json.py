"""Configurations as JSON, in the form that checkpoints store them in."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, cast

from l4jax.config.checks import check
from l4jax.config.drafter import DrafterConfig, Eagle1Config, Eagle3Config
from l4jax.config.model import ModelConfig
from sharding.kinds import shown

_OF_DRAFTERS = (
    *("version", "decoder", "draft_vocab_size", "target_layers", "target_hidden_size", "target_tokenizer", "aux_layers", "own_embedding"),
    *("fuse_bias", "first_layer_normed", "final_normed"),
    *("norm_before_residual", "norm_before_fuse", "norm_each_aux", "norm_fed_back", "target_head", "sources"),
)
"""The stored fields of a drafter, of either version."""


def config_to_json(config: ModelConfig | DrafterConfig) -> dict[str, Any]:
    """Convert everything in ``config``, sources included, to values that JSON keeps exactly."""
    return cast(dict[str, Any], _to_json(config))


def config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of :func:`config_to_json`. Raises :class:`ConfigError` if a field is missing, unknown or of another type."""
    return cast(ModelConfig, _from_json(ModelConfig, values, "config"))


def drafter_config_from_json(values: Mapping[str, Any]) -> DrafterConfig:
    """As :func:`config_from_json`, for a drafter."""
    kinds: dict[str, Any] = {
        **typing.get_type_hints(Eagle1Config),
        **typing.get_type_hints(Eagle3Config),
        "version": Literal["eagle1", "eagle3"],
    }
    given = _fields({name: kinds[name] for name in _OF_DRAFTERS}, values, "drafter")
    version: type[DrafterConfig] = Eagle1Config if given["version"] == "eagle1" else Eagle3Config
    config = version(**{field.name: given.pop(field.name) for field in dataclasses.fields(version)})
    for name, value in given.items():
        expected = stored_fields(config)[name]
        check(value == expected, f"{name} is {json.dumps(value)}; expected {json.dumps(expected)} for {config.version}")
    return config


def stored_fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration, or of a part of one, by name. A drafter's are those of both versions: false what its own lacks."""
    if isinstance(config, DrafterConfig):
        return {name: getattr(config, name, False) for name in _OF_DRAFTERS}
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def flat_fields(config: ModelConfig | DrafterConfig) -> dict[str, Any]:
    """Every value by its dotted name (``moe.num_experts``), as ``sources`` names them; ``sources`` itself is left out."""

    def walk(part: Any, prefix: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in stored_fields(part).items():
            if dataclasses.is_dataclass(value):
                values |= walk(value, f"{prefix}{name}.")
            elif name != "sources":
                values[prefix + name] = value
        return values

    return walk(config, "")


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _to_json(item) for name, item in stored_fields(value).items()}
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value


def _fields(kinds: Mapping[str, Any], value: Any, where: str) -> dict[str, Any]:
    """Convert an object that has exactly these fields."""
    check(isinstance(value, Mapping), f"{where} is {shown(value)}; expected an object")
    unknown, missing = sorted(value.keys() - kinds), sorted(kinds - value.keys())
    check(not unknown, f"{where} has the unknown fields {', '.join(unknown)}; expected {', '.join(kinds)}")
    check(not missing, f"{where} lacks the fields {', '.join(missing)}")
    return {name: _from_json(kinds[name], item, f"{where}.{name}") for name, item in value.items()}


def _from_json(kind: Any, value: Any, where: str) -> Any:
    """Convert ``value`` to the annotation ``kind``: a dataclass, a tuple, an optional, a literal or a scalar."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        (inner,) = (a for a in arguments if a is not types.NoneType)
        return None if value is None else _from_json(inner, value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind(**_fields(typing.get_type_hints(kind), value, where))
    if origin is tuple:
        check(isinstance(value, list), f"{where} is {shown(value)}; expected a list")
        items = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        check(len(items) == len(value), f"{where} has {len(value)} items; expected {len(items)}")
        return tuple(_from_json(item, v, f"{where}[{i}]") for i, (item, v) in enumerate(zip(items, value, strict=True)))
    if origin is Literal:
        check(value in arguments, f"{where} is {shown(value)}; expected one of {', '.join(map(repr, arguments))}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    check(type(value) is kind, f"{where} is {shown(value)}; expected {kind.__name__}")
    return value
